"""A real language model on a laptop: SmolLM2-135M, upcycled to four experts, learns GSM8K."""
