"""Start vLLM, and load, swap and prove adapters in it over HTTP."""
