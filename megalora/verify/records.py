"""Make the inputs of the layer check, note what both models compute, and compare the notes.

    T  tokens      H  hidden      E  experts

Inputs make visible what ordinary ones hide: positions go up to the model's last, so that rotary
scaling acts; tokens have sizes from 1e-5 to 10, so that a norm's epsilon of 1e-6 outweighs the
smallest tokens' mean squares; and the MLP is run a second time on inputs that drive its gates far
beyond 9, where activations and their clamps differ.

Tolerance. Both sides compute the same sums in float32, in another order. Over n terms that leaves
about ``sqrt(n) * 2^-24`` of the largest term: 5e-6 for n = 8192. Softmax turns an error of a logit
of size L into ``L * 2^-23`` of a weight (L = 50: 6e-6); the second run's router does the same.
transformers against itself in float64 differs by 1e-6 to 8e-6 (``benchmarks/layer_check.py``; also
with query and key norms of 10, whose logits go into the hundreds), ours against transformers by
1e-6, because most sums are the same. Of the mistakes that the tests put in, the mildest, a softmax
scale off by a tenth, is 9e-2.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalora.model.families.family import POST_ATTENTION_NORM, Compared

NUM_TOKENS = 16
NUM_HEAD_ROWS = 64
TOLERANCE = 1e-4
"""Largest difference of a token's output, relative to its largest value."""
Records = list[tuple[str, Tensor]]
"""(module as the user knows it, its output ``[T, ...]``), in the order of computing."""

# Columns of ``Compared``: a module's name for the user, in transformers and in Megatron.
THEIRS = 1
OURS = 2
SECOND_NORM = POST_ATTENTION_NORM
"""Run on the layer's input too: behind attention no token is small enough for its epsilon to
show."""


@dataclass(frozen=True)
class Inputs:
    """Tokens, positions and hidden states to compute with, the same on every rank."""

    tokens: list[int]
    """Distinct ids spread over the vocabulary, to look up in the embedding."""
    rows: list[int]
    """Rows of the head to compare."""
    positions_T: Tensor
    x_TH: Tensor
    """Hidden states that enter a layer."""

    @classmethod
    def make(cls, vocab: int, hidden: int, max_positions: int) -> "Inputs":
        # A generator of its own: the run's generators stay as they are.
        generator = torch.Generator().manual_seed(0)
        steps = torch.arange(NUM_TOKENS)
        last = NUM_TOKENS - 1
        # 1e-5 to 10. 7 has no divisor in common with 16: every size comes once, and neighbours
        # differ much.
        sizes_T = 10.0 ** (-5 + 6 * (7 * steps % NUM_TOKENS) / last)
        # 0 to the last position, evenly spaced in logarithms.
        positions = [round(max_positions ** (i / last)) - 1 for i in range(NUM_TOKENS)]
        return cls(
            tokens=_spread(vocab, NUM_TOKENS),
            rows=_spread(vocab, NUM_HEAD_ROWS),
            positions_T=torch.tensor(positions),
            x_TH=torch.randn(NUM_TOKENS, hidden, generator=generator) * sizes_T[:, None],
        )


def _spread(size: int, count: int) -> list[int]:
    """At most ``count`` distinct numbers from 0 to size - 1, both ends among them."""
    return sorted({round(i * (size - 1) / (count - 1)) for i in range(count)})


def driven(h_TH: Tensor) -> Tensor:
    """The MLP's second input: tokens of unit root mean square times 1 to 16, which drives gates far
    beyond 9.

    No further: the router's logits grow by the same factor, and softmax turns their rounding into
    the weights'.
    """
    factor_T = 2.0 ** (4 * torch.arange(len(h_TH)) / (len(h_TH) - 1))
    rms_T1 = h_TH.square().mean(-1, keepdim=True).sqrt()
    return h_TH / rms_T1 * factor_T[:, None]


def first_difference(ours: Records, theirs: Records) -> tuple[str, float] | None:
    """The first module whose output differs beyond rounding, and by how much; None where all
    agree."""
    reference = dict(theirs)
    for name, value in ours:
        # Modules that only one side has, such as a norm that the other fuses, are not compared.
        if name not in reference:
            continue
        error = relative_difference(value, reference[name])
        if not error <= TOLERANCE:
            return name, error
    return None


def largest_difference(ours: Records, theirs: Records) -> float:
    """The largest difference of any module, within rounding or not."""
    reference = dict(theirs)
    errors = []
    for name, value in ours:
        if name in reference:
            errors.append(relative_difference(value, reference[name]))
    return max(errors)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of any token over that token's largest value; infinite for another size or
    no number."""
    if ours.numel() != theirs.numel():
        return math.inf
    ours = ours.reshape(len(theirs), -1)
    theirs = theirs.reshape(len(theirs), -1)
    largest_T = theirs.abs().amax(1).clamp_min(torch.finfo(theirs.dtype).tiny)
    error = ((ours - theirs).abs().amax(1) / largest_T).max().item()
    return math.inf if math.isnan(error) else error


def rotary_difference(angles_TD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> float:
    """Largest difference between our rotary angles and transformers' tables, as a multiple of what
    rounding explains.

    An angle is position times frequency, and a frequency computed in another way (a power on a GPU,
    a scaling before or after a division) may differ by 8 roundings: ``angle * 2^-21``, which is
    0.06 at position 131072 for the fastest frequencies and nothing for the slow ones that scaling
    changes. The tables' scale is left to the attention's comparison.
    """
    if angles_TD.shape != cos_TD.shape:
        return math.inf
    cos = angles_TD.cos()
    sin = angles_TD.sin()
    # The angle between (cos, sin) and (cos', sin'), whatever the tables' scale.
    apart = torch.atan2(sin_TD * cos - cos_TD * sin, cos_TD * cos + sin_TD * sin).abs()
    return (apart / (2.0**-20 + 2.0**-21 * angles_TD.abs())).max().item()


@contextmanager
def noted(
    layer: nn.Module, column: int, compared: Compared, records: Records, suffix: str = ""
) -> Iterator[None]:
    """Append the outputs of the compared modules of a layer that runs inside the block, tokens
    first; ``column`` says whose names count, ``THEIRS`` or ``OURS``."""
    modules = dict(layer.named_modules())

    def note(name: str) -> Any:
        return lambda module, args, output: records.append((name + suffix, tokens_first(output)))

    hooks = []
    for row in compared:
        # A dense layer has no router, many MoE layers have no shared expert.
        if row[column] in modules:
            hooks.append(modules[row[column]].register_forward_hook(note(row[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tokens_first(output: Any) -> Tensor:
    """A module's output as ``[T, ...]``. Megatron's linears hand out a bias to be added later: it
    is added here."""
    value, *rest = output if isinstance(output, tuple) else (output,)
    if rest and isinstance(rest[0], Tensor) and rest[0].shape == value.shape[-1:]:
        value = value + rest[0]
    return value.detach().reshape(NUM_TOKENS, -1).clone()  # Megatron adds the residual in place


def dense_routing(index_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Weights and choice of every token for all experts, ``[T, E]`` each, from those of the K
    chosen ones."""
    probs_TE = torch.zeros(len(index_TK), num_experts, dtype=weights_TK.dtype)
    map_TE = torch.zeros(len(index_TK), num_experts, dtype=torch.bool)
    return probs_TE.scatter(1, index_TK, weights_TK), map_TE.scatter(1, index_TK, True)
