"""An environment with a tool: the model may have sums computed before it answers."""
