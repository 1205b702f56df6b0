"""LoRA for mixture-of-experts models on Megatron-Core."""
