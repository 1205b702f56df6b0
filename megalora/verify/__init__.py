"""Compare our models with a reference: transformers, stock PEFT or vLLM."""
