"""The frozen base model: Megatron's GPTModel with parts in plain torch."""
