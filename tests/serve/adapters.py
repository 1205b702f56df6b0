"""Make random adapters in folders, as megalora exports them, and prompts."""

from pathlib import Path
from typing import Any

import torch

from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from tests.parity.built import random_factors

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
EVERYTHING = [*ATTENTION, *EXPERTS, "gate"]


def make_adapter(folder: Path, base: Path, seed: int, **lora: Any) -> Path:
    """A random adapter of ``base`` with deltas of about a fifth of the weights: different text for
    every seed."""
    # alpha is not the rank: a server that left the scale out would be found.
    config = LoRAConfig(**({"rank": 4, "alpha": 8.0, "target_modules": EVERYTHING} | lora))
    adapted, factors = random_factors(config, base, seed)
    folder.mkdir(parents=True)
    write_adapter(folder, adapted, model_shape(read_hf_config(base)), factors, str(base))
    return folder


def tokens_of(seed: int, length: int, vocabulary: int = 512) -> list[int]:
    """A prompt; ordinary tokens only, so that nothing stops at one."""
    # The tiny tokenizer has its special tokens at the end.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary - 3, (length,), generator=generator).tolist()
