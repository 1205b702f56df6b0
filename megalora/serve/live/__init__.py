"""Send adapters from a running training to vLLM servers, from memory to memory."""
