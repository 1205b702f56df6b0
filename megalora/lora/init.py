"""Initial adapter values as a function of (seed, tensor name), so that every layout starts from the
same adapter."""

import hashlib
import math

import torch
from torch import Tensor

from megalora.lora.spec import tensor_name


def initial_a(seed: int, hf_module: str, rank: int, in_features: int, cycle: int = 0) -> Tensor:
    """The whole A of one HF linear, ``[rank, in_features]`` float32 on the CPU; B starts at zero.

    Kaiming-uniform with a = sqrt(5), as in PEFT: uniform in ±1/sqrt(in_features), fan-in of this
    matrix alone.

    Args:
        cycle: above 0 for adapters that follow merged ones, each of which is drawn anew.
    """
    key = f"{seed}:{tensor_name(hf_module, 'A')}"
    if cycle:
        key = f"{cycle}:{key}"
    # Not torch's own hash of a string, which differs from process to process. One bit less: torch
    # takes seeds as signed 64-bit numbers.
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
