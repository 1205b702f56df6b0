"""Bases of every family, made once, for the cases about adapters."""

from tests.adapters.conftest import bases, peft_knows_qwen2_moe

__all__ = ["bases", "peft_knows_qwen2_moe"]
