"""Define one model, one batch and one set of starting factors for every library that ``peers``
compares.

Weights are a function of (seed, published name), so that each process draws its own and all hold
the same values (``random_weights.py``); so are the A's. B starts at zero everywhere.

A's are drawn for four inputs of a layer: attention's (q, k, v), o_proj's, the experts' (gate, up)
and down_proj's. Libraries differ in how many A's read one input: megalora has one per projection,
PEFT one for gate and up, Bridge one for q, k and v too. To prove that they compute the same, those
with several start them equal and add up their gradients; then all of them train the same function
with the same optimizer (``Tied``).

Shape legend: E experts   R rank   H hidden   I expert intermediate
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.random_weights import generator
from benchmarks.train_arms import Setup, Training
from benchmarks.train_case import QWEN3_30B_A3B

Input = Literal["qkv", "o", "gate_up", "down"]
"""Input that an A reads, as the module's docstring has them."""


@dataclass(frozen=True)
class Shape:
    """One model and batch of the comparison."""

    name: str
    config: Mapping[str, Any]
    num_tokens: int
    rank: int

    @property
    def rows_per_expert(self) -> float:
        return self.num_tokens * self.config["num_experts_per_tok"] / self.config["num_experts"]

    def setup(self, device: torch.device, dtype: torch.dtype) -> Setup:
        return Setup(dict(self.config), self.rank, self.num_tokens, device, dtype)

    def sizes(self) -> dict[str, Any]:
        """Sizes that the record states."""
        names = (
            "num_hidden_layers", "hidden_size", "moe_intermediate_size", "num_experts",
            "num_experts_per_tok",
            "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        )  # fmt: skip
        sizes = {name: self.config[name] for name in names}
        return {"shape": self.name, "tokens": self.num_tokens, "rank": self.rank, **sizes}


def _shape(name: str, num_tokens: int, rank: int, **sizes: int) -> Shape:
    return Shape(name, {**QWEN3_30B_A3B, **sizes}, num_tokens, rank)


CPU_SHAPES = (
    # Qwen3-30B-A3B at an eighth of its width with all of its experts: 8 rows per expert.
    _shape(
        "many small experts", 128, 8, num_hidden_layers=2, hidden_size=256,
        moe_intermediate_size=96, num_experts=128,
        num_experts_per_tok=8, num_attention_heads=4, num_key_value_heads=1, head_dim=64,
        vocab_size=2048,
    ),
    # Mixtral-8x7B at an eighth of its width: 32 rows per expert.
    _shape(
        "few larger experts", 128, 8, num_hidden_layers=2, hidden_size=512,
        moe_intermediate_size=1792, num_experts=8,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=1, head_dim=128,
        vocab_size=2048,
    ),
)  # fmt: skip
"""128 tokens are one sample of GSM8K, a usual microbatch on a machine with two cores."""
GPU_SHAPES = (_shape("8 layers of Qwen3-30B-A3B", 4096, 16, num_hidden_layers=8),)
DRY_SHAPES = (
    _shape(
        "tiny", 48, 4, num_hidden_layers=2, hidden_size=48, moe_intermediate_size=40, num_experts=6,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=300,
    ),
)  # fmt: skip


def initial_a(setup: Setup, layer: int, read: Input) -> Tensor:
    """A of one input: ``[R, in]``, of experts ``[E, R, in]``; float32 on the CPU, uniform as PEFT
    draws it."""
    c = setup.config
    features = {
        "qkv": c["hidden_size"],
        "o": c["num_attention_heads"] * c["head_dim"],
        "gate_up": c["hidden_size"],
        "down": c["moe_intermediate_size"],
    }[read]
    lead = (c["num_experts"],) if read in ("gate_up", "down") else ()
    # On the CPU: a GPU's generator draws other numbers from the same seed.
    g = generator(torch.device("cpu"), setup.seed, "A", layer, read)
    # Kaiming-uniform with a = sqrt(5) has the bound 1 / sqrt(inputs).
    return torch.empty(*lead, setup.rank, features).uniform_(-1, 1, generator=g) * features**-0.5


class Tied:
    """A's that read one input and start equal; their gradients are added up, so that they stay
    equal."""

    def __init__(self, groups: Iterable[list[Callable[[], Tensor]]]) -> None:
        """``groups``: for each input with several A's, functions that return their gradients."""
        self.groups = [group for group in groups if len(group) > 1]

    @torch.no_grad()
    def add_up(self) -> None:
        """Give every A of a group the sum of the group's gradients.

        One A that all of them shared would have that sum as its gradient.
        """
        for group in self.groups:
            gradients = [gradient() for gradient in group]
            total = torch.stack(gradients).sum(0)
            for gradient in gradients:
                gradient.copy_(total)


@dataclass(frozen=True)
class PeerArm:
    """One library's training step on the common model."""

    training: Training
    tied: Tied
    same_factors: bool
    """Whether, with its A's tied, it trains the function that megalora trains: then the losses of
    all steps must agree."""
    model: nn.Module
