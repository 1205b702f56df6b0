"""Initial adapter values as a function of (seed, tensor name), so that every layout starts from the
same adapter."""

import hashlib
import math

import torch
from torch import Tensor

from megalora.hf.tensor_names import SCORE, tensor_name, weight_name


def initial_a(seed: int, hf_module: str, rank: int, in_features: int, cycle: int = 0) -> Tensor:
    """The whole A of one HF linear, ``[rank, in_features]`` float32 on the CPU; B starts at zero.

    Kaiming-uniform with a = sqrt(5), as in PEFT: uniform in ±1/sqrt(in_features), fan-in of this
    matrix alone.

    Args:
        cycle: above 0 for adapters that follow merged ones, each of which is drawn anew.
    """
    generator = generator_of(seed, tensor_name(hf_module, "A"), cycle)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def initial_score(seed: int, num_scores: int, hidden: int, std: float) -> Tensor:
    """The whole ``score.weight [num_scores, hidden]`` float32 on the CPU: normal with mean 0, as
    transformers draws it, whose ``initializer_range`` is ``std``."""
    generator = generator_of(seed, weight_name(SCORE))
    return torch.empty(num_scores, hidden).normal_(std=std, generator=generator)


def generator_of(seed: int, name: str, cycle: int = 0) -> torch.Generator:
    """A generator of its own for every seed, tensor name and cycle."""
    key = f"{seed}:{name}"
    if cycle:
        key = f"{cycle}:{key}"
    # Not torch's own hash of a string, which differs from process to process. One bit less: torch
    # takes seeds as signed 64-bit numbers.
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
