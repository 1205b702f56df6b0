"""The routed experts of one layer as one autograd node: gate_up, SwiGLU with probabilities, down,
adapters on all three.

    [gate | up][m] = W1[e] x[source m] + B1[e] S1[m]        S1[m] = scale A1[e] x[source m]
    h[m]           = silu(gate[m]) * up[m] * p[m]           S2[m] = scale A2[e] h[m]
    y[m]           = W2[e] h[m] + B2[e] S2[m]
    out[t]         = sum over t's rows m of y[m]          (y itself where rows are sorted by expert)

Backward, with dY[m] = dout[source m], dS2 = scale dY B2 and dS1 = scale d[gate | up] B1:

    dH = dY W2 + dS2 A2      dA2 = dS2ᵀ H      dB2 = dYᵀ S2      d[gate | up], dp: through SwiGLU
    dX = d[gate | up] W1 + dS1 A1, summed over each token's rows
    dA1 = dS1ᵀ X             dB1 = d[gate | up]ᵀ S1

Kept for backward: x as it was given, [gate | up] (unless it is recomputed), S1, S2, p. H is made
again from [gate | up] in the pass that needs it; rows are gathered again from x. Per row and in
elements that is H (only where x is permuted), 2I and R + Q.

Shape legend: T tokens or rows of x   M routed rows   E experts   H hidden   I intermediate
J = 2I   R rank of gate and up stacked   Q rank of down
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .augmented_weight import AugmentedWeight
from .backend import choose
from .dropout import experts_with_dropout
from .engine import Rows, Weight
from .expert_factors import ExpertFactors
from .expert_node import Operands, Static, gradients_of_b
from .expert_operands import check_operands
from .grouped_gemm import grouped_gemm_ref
from .routing import Routing
from .row_gain import gain_rows_ref
from .scaled_experts import ScaledExperts
from .shrink import shrink_ref
from .sums import Sums
from .swiglu import swiglu_ref

# ---- 1. reference: the specification, read this first --------------------------------------------


def expert_mlp_ref(
    x_TH: torch.Tensor, gate_up_EJH: torch.Tensor, down_EHI: torch.Tensor, p_M: torch.Tensor,
    routing: Routing,
    gate_up: ExpertFactors | None = None, down: ExpertFactors | None = None, dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """The same function in plain PyTorch; autograd derives the gradients. Slow, and the only
    spec."""
    x_MH = x_TH if routing.source_M is None else x_TH[routing.source_M.long()]

    def linear(
        x: torch.Tensor, weight_ENK: torch.Tensor, adapter: ExpertFactors | None
    ) -> torch.Tensor:
        w_EKN = weight_ENK.transpose(1, 2)
        if adapter is None:
            return grouped_gemm_ref(x, w_EKN, routing)
        s_MR = shrink_ref(F.dropout(x, dropout), adapter.a, routing)
        y = grouped_gemm_ref(
            x, w_EKN, routing, s_MR, (adapter.whole_b(weight_ENK.shape[1]).transpose(1, 2),)
        )
        return y if adapter.gain is None else gain_rows_ref(y, adapter.gain, routing)

    y_MH = linear(swiglu_ref(linear(x_MH, gate_up_EJH, gate_up), p_M), down_EHI, down)
    if routing.slots_TK is None:
        return y_MH
    # A slot below 0 is empty.
    y_TKH = y_MH[routing.slots_TK.long().clamp(min=0)]
    return torch.where(routing.slots_TK[..., None] < 0, 0, y_TKH).sum(1)


# ---- 2. autograd ---------------------------------------------------------------------------------


FLAT = 9  # tensors before the B's: x, p, offsets, source, slots, w1, w2, a1, a2
FIRST_FACTOR = 8  # place of a1 among the inputs; the static part stands first


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, static: Static, *tensors: torch.Tensor | None) -> torch.Tensor:
        o = Operands(static, tensors)
        y_MJ, rows = o.gate_up()
        inner = o.engine.swiglu(y_MJ, o.p, o.a2, o.weight2, o.scale2)
        out = o.engine.combine(o.engine.linear(inner, o.weight2, o.blocks2))
        wants = ctx.needs_input_grad[1:]
        wants_b1 = any(wants[FLAT : FLAT + static.blocks[0]])
        wants_b2 = any(wants[FLAT + static.blocks[0] :])
        before_swiglu = any(wants[i] for i in (0, 1, 7, 8)) or wants_b1  # anything but B of down
        keep_x = wants[7] or (static.recompute and before_swiglu)
        keep_y = before_swiglu and not static.recompute
        # S is a view into its rows where operands are joined: a copy, so that the rows are not kept
        # for its sake.
        s1 = rows.s_MR.contiguous() if rows.s_MR is not None and before_swiglu else None
        s2 = inner.s_MR.contiguous() if inner.s_MR is not None and wants_b2 else None
        x, p, offsets, source, slots, w1, w2, *factors = tensors
        kept = (x if keep_x else None, p, offsets, source, slots, w1, w2, *factors)
        ctx.save_for_backward(*kept, y_MJ if keep_y else None, s1, s2)
        ctx.static = static
        ctx.before_swiglu = before_swiglu
        ctx.wants_b = (wants_b1, wants_b2)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *douts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *kept, y_MJ, s1, s2 = ctx.saved_tensors
        o = Operands(ctx.static, tuple(kept))
        _, wants_b2 = ctx.wants_b
        _, wants_dx, *_ = ctx.needs_input_grad
        wants_a1 = ctx.needs_input_grad[FIRST_FACTOR]
        dout = o.engine.dense(douts[0])
        sums = o.engine.sums(dout, o.gradient_shapes(ctx.before_swiglu, wants_a1, wants_b2))
        da1, da2, *db = sums.places
        db1 = db[: ctx.static.blocks[0]]
        db2 = db[ctx.static.blocks[0] :]
        if wants_b2:
            assert o.adapter2 is not None
            gradients_of_b(o, o.adapter2, s2, dout, db2, o.routing.source_M)
        dy = dx = None
        if ctx.before_swiglu:
            if y_MJ is None:
                y_MJ = o.gate_up()[0]  # the rows, gathered again on the way, are not held
            dy = _through_swiglu(o, dout, y_MJ, s1, sums, da2, db1)
            if wants_a1:
                o.engine.wgrad(dy.s_MR, o.x, da1, o.routing.source_M)  # pyright: ignore[reportArgumentType]
        dp, gradients = sums.finish()
        if dy is not None and wants_dx:
            dx = o.engine.combine(o.engine.dgrad(dy, o.weight1, o.a1))
        grads = (None, dx, dp, *[None] * (FIRST_FACTOR - 3), *gradients)
        return tuple(
            g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=True)
        )


def _through_swiglu(
    o: Operands, dout: torch.Tensor, y_MJ: torch.Tensor, s1: torch.Tensor | None,
    sums: Sums, da2: torch.Tensor | None, db1: list[torch.Tensor | None],
) -> Rows:  # fmt: skip
    """From the output's gradient to that of [gate | up] and dS1; dp, dA2 and dB1 go to ``sums``."""
    engine = o.engine
    rows = engine.shrink(dout, o.blocks2, o.weight2, o.routing.source_M, scale=o.scale2)
    dh_MI = engine.dgrad(rows, o.weight2, o.a2)
    return engine.swiglu_backward(
        dh_MI, y_MJ, o.p, s1, o.blocks1, rows.s_MR, o.weight1, sums, da2, db1, o.scale1
    )  # fmt: skip


# ---- 3. public function --------------------------------------------------------------------------


def expert_mlp(
    x_TH: torch.Tensor,
    gate_up_EJH: torch.Tensor | AugmentedWeight,
    down_EHI: torch.Tensor | AugmentedWeight,
    p_M: torch.Tensor,
    routing: Routing,
    *,
    gate_up: ExpertFactors | None = None,
    down: ExpertFactors | None = None,
    dropout: float = 0.0,
    recompute: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """SwiGLU experts with frozen weights and LoRA. Differentiable once in x, p and the adapters'
    factors.

    Args:
        x_TH: tokens, or rows sorted by expert (``routing.source_M`` None), any strides.
        gate_up_EJH: frozen; gate's rows, then up's. ``AugmentedWeight``: with room for the adapter.
        down_EHI: frozen. ``CodedWeight``, here or above: decoded, and again in backward.
        p_M: routing probability of each row, float32 or x's dtype.
        routing: which rows are whose, and whether to gather and to combine.
        gate_up, down: adapters in x's dtype.
        dropout: probability of zeroing an input of A (the base sees it whole). Not one node then,
            see ``dropout.py``.
        recompute: keep x, not [gate | up], and compute that again in backward; with dropout
            everything.
        backend: as in ``grouped_lora``.

    Returns:
        ``[T', H]`` in x's dtype: each token's sum, T' tokens as ``routing.slots_TK`` has rows;
        without it, ``[M, H]``.

    Raises:
        ValueError: operands that do not fit; a weight that requires a gradient; a back end that
            cannot run here.
    """
    adapters = (gate_up, down)
    weights = (Weight(gate_up_EJH), Weight(down_EHI))
    check_operands(x_TH, weights, p_M, routing, adapters)
    name = _choose(backend, x_TH, routing, weights, adapters)
    if name == "reference":
        first, second = weights[0].own_copy(), weights[1].own_copy()
        return expert_mlp_ref(x_TH, first, second, p_M, routing, gate_up, down, dropout)
    if dropout > 0:
        operands = (x_TH, gate_up_EJH, down_EHI, p_M, routing, gate_up, down, dropout, name)
        if recompute:
            return checkpoint(experts_with_dropout, *operands, use_reentrant=False)
        return experts_with_dropout(*operands)
    return _apply(name, recompute, x_TH, p_M, routing, weights, adapters)


def _choose(
    backend: str | None,
    x_TH: torch.Tensor,
    routing: Routing,
    weights: tuple[Weight, Weight],
    adapters: tuple[ExpertFactors | None, ExpertFactors | None],
) -> str:
    """The back end that was asked for, or the one that suits these sizes (``backend.py``)."""
    rank = 0
    # Whether every adapted weight has its adapter's columns beside it, so that one GEMM does both.
    room = True
    for weight, adapter in zip(weights, adapters, strict=True):
        if adapter is not None:
            rank = max(rank, adapter.a.shape[1])
            room = room and weight.joined is not None
    # Sizes and strides are enough to choose by: nothing is decoded for it.
    w1, w2 = (w.like_ENK for w in weights)
    layer = (w2.shape[1], w2.shape[2])
    return choose(backend, "expert_mlp", x_TH, routing.num_rows, rank, [w1, w2], room, layer)


def _apply(
    backend: str, recompute: bool, x_TH: torch.Tensor, p_M: torch.Tensor, routing: Routing,
    weights: tuple[Weight, Weight], adapters: tuple[ExpertFactors | None, ExpertFactors | None],
) -> torch.Tensor:  # fmt: skip
    """Lay the operands out flat, as autograd takes them."""
    b1, b2 = (() if adapter is None else adapter.b for adapter in adapters)
    a1, a2 = (None if adapter is None else adapter.a for adapter in adapters)
    s1, s2 = (() if adapter is None else adapter.scale for adapter in adapters)
    joined = (weights[0].not_kept, weights[1].not_kept)
    static = Static(backend, recompute, routing.num_rows, joined, (s1, s2), (len(b1), len(b2)))
    w1, w2 = (w.kept for w in weights)
    # One value per row or expert: kernels take these as contiguous, which they nearly always are.
    per_row = (
        t if t is None else t.contiguous()
        for t in (p_M, routing.offsets_E, routing.source_M, routing.slots_TK)
    )
    tensors = (x_TH, *per_row, w1, w2, a1, a2, *b1, *b2)
    gains = [None if adapter is None else adapter.gain for adapter in adapters]
    if any(gain is not None for gain in gains):
        return ScaledExperts.apply(static, *gains, *tensors)  # pyright: ignore[reportReturnType]
    return _ExpertMLP.apply(static, *tensors)  # pyright: ignore[reportReturnType]
