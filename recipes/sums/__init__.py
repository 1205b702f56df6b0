"""Learn sums from rewards: vLLM samples, and takes each version of the adapter while it runs."""
