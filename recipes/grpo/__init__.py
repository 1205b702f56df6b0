"""Learn from a reward of one's own, without a server."""
