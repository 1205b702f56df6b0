"""DoRA: a trained magnitude for every row of an adapted weight (https://arxiv.org/abs/2402.09353).

    y = g * (W x + s B A x) + bias        V = W + s B A
    g = m / |V|                           |V|: the norm of each row of V, not differentiated (§4.3)

Neither V nor B A is made, for with the row w of W and the row b of s B

    |v|^2 = |w|^2 + 2 b . (A w) + b (A A^T) b^T

Norms change only when the optimizer steps, so they are computed once a step, not in every pass.

    kind            m, |V| on one rank    norm                               gradient of m
    column          [out/t]               local                              whole
    row             [out]                 squares are partial sums over TP   partial: S/t tokens
    expert_column   [E/ep, out/n]         local                              whole
    expert_row      [E/ep, out]           partial sums over ETP              partial over ETP

Each expert has magnitudes of its own. Its rows are scaled by the kernels
(``megalora_kernels/scaled_experts.py``): under ETP the output of down is a partial sum, and a
multiple of a sum is the sum of multiples.

Shape legend, with E local experts in front where there are several:
    S  sequence      B  batch      O  rows of the fused weight on this rank
    I  its columns   R  sum of the ranks stacked in A
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megalora.comm import sum_bucket
from megalora.lora.factors import LoRAFactors
from megalora.parallel import Groups


class _ScaleRows(torch.autograd.Function):
    """``u * g`` for ``u`` ``[..., O]`` and float32 ``g`` ``[O]``; keeps u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, g_O: Tensor) -> Tensor:
        ctx.save_for_backward(u, g_O)
        return _times(u, g_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        u, g_O = ctx.saved_tensors
        dg_O = (grads[0] * u).flatten(0, -2).sum(0, dtype=torch.float32)
        return _times(grads[0], g_O), dg_O


def _times(u: Tensor, g_O: Tensor) -> Tensor:
    """``u * g`` in u's dtype, rounded once: in bfloat16 g itself could not be told from 1."""
    return torch.mul(u, g_O, out=torch.empty_like(u))


def scale_rows(u: Tensor, factors: LoRAFactors) -> Tensor:
    """``g * u``, where u ``[S, B, O]`` is the adapted linear's output without its bias."""
    return _ScaleRows.apply(u, gains(factors))


def gains(factors: LoRAFactors) -> Tensor:
    """g as float32 ``[O]``, of experts ``[E, O]``, in the order of the base weight's rows; 1 where
    a row is not adapted."""
    blocks: list[Tensor] = []
    for name, block_rows in zip(factors.names, factors.block_rows, strict=True):
        sizes = (*factors.lora_A.shape[:-2], factors.row_groups, block_rows)
        if name in factors.lora_M:
            m: Any = factors.lora_M[name]
            blocks.append((m / factors.norms[name]).view(sizes))
        else:
            blocks.append(torch.ones(sizes, device=factors.lora_A.device))
    # Side by side within each row group, as in ``stacked_b``.
    return torch.cat(blocks, dim=-1).flatten(-2)


@torch.no_grad()
def refresh_norms(chunks: Iterable[nn.Module], groups: Groups, *, start: bool = False) -> None:
    """Compute the norms of the adapters as they are now; collective over tensor parallelism.

    Needed whenever A or B has changed: after loading and after every optimizer step.

    Args:
        start: let every magnitude begin as its norm, which makes the model the base: B is zero.
    """
    found: list[LoRAFactors] = []
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, LoRAFactors) and len(module.lora_M):
                found.append(module)
    squares = {factors: _squared_norms(factors) for factors in found}
    # Where the columns of W are split, each rank has part of every row's sum: all in one message.
    partial: dict[str, list[Tensor]] = defaultdict(list)
    for factors in found:
        if factors.sharding.split_a is not None:
            partial[factors.sharding.group].append(squares[factors])
    for group, tensors in partial.items():
        sum_bucket(tensors, groups.named(group))
    for factors in found:
        _keep_norms(factors, squares[factors], start)


def _squared_norms(factors: LoRAFactors) -> Tensor:
    """``|V|^2`` of this rank's columns, float32 ``[O]``, of experts ``[E, O]``."""
    assert factors.base_weight is not None, "a layer with magnitudes gives its weight"
    weight = factors.base_weight()
    if factors.squares is None:
        # Of W alone, which never changes.
        norms_O = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32)
        factors.squares = norms_O.square()
    a_RI: Tensor = factors.lora_A.float()
    b_OR = factors.stacked_b().float()
    # A w of every row: the only product with W, as for O more tokens through A.
    wa_OR = (weight @ factors.lora_A.transpose(-1, -2)).float()
    gram_RR = a_RI @ a_RI.transpose(-1, -2)
    return factors.squares + (b_OR * (2 * wa_OR + b_OR @ gram_RR)).sum(-1)


def _keep_norms(factors: LoRAFactors, squares_O: Tensor, start: bool) -> None:
    """Let each projection have the norms of its own rows."""
    # A row of zeros has the norm 0: with the smallest number instead it stays 0 and not NaN.
    tiny = torch.finfo(torch.float32).tiny
    norms_O = squares_O.clamp_min(tiny).sqrt()
    groups = norms_O.unflatten(-1, (factors.row_groups, -1))
    rows = groups.split(factors.block_rows, dim=-1)
    for name, of_projection in zip(factors.names, rows, strict=True):
        if name in factors.lora_M:
            # A copy: a view would keep rows without magnitudes, too.
            factors.norms[name] = of_projection.flatten(-2).clone()
            if start:
                m: Any = factors.lora_M[name]
                m.copy_(factors.norms[name])
