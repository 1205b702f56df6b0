"""Grouped LoRA for mixture-of-experts layers. Depends on torch and nothing else."""

from .grouped_lora import grouped_lora

__all__ = ["grouped_lora"]
