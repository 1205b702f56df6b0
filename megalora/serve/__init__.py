"""Serving: start vLLM from its own environment, and load, swap and question adapters over HTTP."""
