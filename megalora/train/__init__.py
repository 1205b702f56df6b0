"""The training loop and its parts, from a config to checkpoints."""
