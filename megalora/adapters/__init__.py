"""Hugging Face on one side, Megatron on the other: base weights in, adapters out and back."""
