"""Give the cases about adapters bases of every family, made once."""

from tests.adapters.conftest import bases, peft_knows_qwen2_moe

__all__ = ["bases", "peft_knows_qwen2_moe"]
