"""Generate text with our own model, adapters included, under tensor and expert parallelism."""
