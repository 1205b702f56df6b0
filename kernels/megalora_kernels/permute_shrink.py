"""Permute and shrink as one differentiable step: rows in expert order and their rank-wide product,
in one pass.

    rows[m] = x[source m]      s[m] = rows[m] @ a[e]ᵀ

    dx[t] = sum over t's rows m of (drows[m] + ds[m] @ a[e])
    da[e] = ds[rows of e]ᵀ x[source of those rows]

Kept for backward: x as it was given and a. For stacks that run their own grouped GEMM on the
permuted rows; ``expert_mlp`` has this inside.

Shape legend: T tokens   M routed rows   E experts   K features   R rank
"""

from typing import Any

import torch

from .backend import choose_pass
from .checks import check_placement
from .engine import make_engine
from .routing import Routing, gather
from .shrink import shrink_ref

# ---- 1. reference --------------------------------------------------------------------------------


def permute_shrink_ref(
    x_TK: torch.Tensor, a_ERK: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification; differentiable."""
    x_MK = gather(x_TK, routing.source_M)
    return x_MK, shrink_ref(x_MK, a_ERK, routing)


# ---- 2. autograd ---------------------------------------------------------------------------------


class _PermuteShrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: torch.Tensor, a_ERK: torch.Tensor, offsets_E: torch.Tensor,
        source_M: torch.Tensor,
        slots_TK: torch.Tensor, backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        routing = Routing(offsets_E, source_M.shape[0], source_M, slots_TK)
        engine = make_engine(backend, routing)
        rows_MK = x_TK.new_empty(routing.num_rows, x_TK.shape[1])
        s_MR = x_TK.new_empty(routing.num_rows, a_ERK.shape[1])
        engine.passes.shrink(engine.dense(x_TK), (a_ERK,), routing, s_MR, source_M, rows_MK)
        ctx.save_for_backward(x_TK, a_ERK, offsets_E, source_M, slots_TK)
        ctx.backend = backend
        return rows_MK, s_MR

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, drows_MK: torch.Tensor, ds_MR: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x_TK, a_ERK, offsets_E, source_M, slots_TK = ctx.saved_tensors
        engine = make_engine(ctx.backend, Routing(offsets_E, source_M.shape[0], source_M, slots_TK))
        # Both ways into a row at once, then each token sums its own k rows.
        dx_TK = engine.combine(engine.from_rank(ds_MR, a_ERK).add_(drows_MK))
        sums = engine.sums(x_TK, [a_ERK.shape[1:]])
        engine.wgrad(ds_MR, x_TK, sums.places[0], source_M)
        _, (da_ERK,) = sums.finish()
        return dx_TK, da_ERK, None, None, None, None


# ---- 3. public function --------------------------------------------------------------------------


def permute_shrink(
    x_TK: torch.Tensor, a_ERK: torch.Tensor, routing: Routing, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted by expert and ``S = rows Aᵀ``. Differentiable once in x and a.

    Args:
        x_TK: tokens.
        a_ERK: A of this rank's experts, in x's dtype.
        routing: with ``source_M`` and ``slots_TK``.
        backend: "reference", "loop" or "triton"; None: triton on a GPU, loop elsewhere.

    Returns:
        ``rows [M, K]`` and ``s [M, R]``, both in x's dtype; s is accumulated in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a routing without source, or a back
            end that cannot run here.
    """
    if (
        x_TK.dim() != 2
        or a_ERK.dim() != 3
        or a_ERK.shape[::2] != (routing.num_experts, x_TK.shape[1])
    ):
        raise ValueError(
            f"permute_shrink: want x [T, K] and a [E, R, K] with E = {routing.num_experts}; "
            f"got {tuple(x_TK.shape)} and {tuple(a_ERK.shape)}"
        )
    if routing.source_M is None or routing.slots_TK is None:
        raise ValueError(
            "permute_shrink: routing has no source_M and slots_TK; rows are sorted already"
        )
    check_placement("permute_shrink", x_TK, routing.offsets_E, a=a_ERK)
    name = choose_pass(backend, "permute_shrink", x_TK, a_ERK.shape[1])
    if name == "reference":
        return permute_shrink_ref(x_TK, a_ERK, routing)
    # Kernels read these three without strides.
    offsets_E = routing.offsets_E.contiguous()
    source_M = routing.source_M.contiguous()
    slots_TK = routing.slots_TK.contiguous()
    return _PermuteShrink.apply(x_TK, a_ERK, offsets_E, source_M, slots_TK, name)  # pyright: ignore[reportReturnType]
