"""Talk to an adapter and to its base, computed here or by a server."""
