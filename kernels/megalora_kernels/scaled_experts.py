"""Experts whose outputs are scaled by a gain for each row of their weights (DoRA), as one node.

    u1[m] = W1[e] x[source m] + B1[e] S1[m]       y1[m] = g1[e] u1[m]
    h[m]  = silu(gate) up p[m]                    of y1 = [gate | up]
    u2[m] = W2[e] h[m] + B2[e] S2[m]              y2[m] = g2[e] u2[m]

S1, S2 and what becomes of y2 are those of ``expert_mlp.py``, and so is backward, which starts from
du2 = g2 dy2 and goes on from du1 = g1 dy1. Besides, dg[e] = sum over m of dy[m] u[m].

Kept in place of y1: u1, from which y1 is made again. u2 is not kept: with H elements a row it would
be the largest of all, so the product of down is computed once more in backward.

Shape legend: T tokens or rows of x   M routed rows   E experts   H hidden   I intermediate   J = 2I
"""

from typing import Any

import torch

from .expert_node import Operands, Static, gradients_of_b
from .sums import Sums


class ScaledExperts(torch.autograd.Function):
    """Inputs: the static part, g1 ``[E, J]`` and g2 ``[E, H]`` or None, those of ``Operands``."""

    @staticmethod
    def forward(
        ctx: Any,
        static: Static,
        g1_EJ: torch.Tensor | None,
        g2_EH: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        o = Operands(static, tensors)
        u1_MJ, rows = o.gate_up()
        y1_MJ = _scaled(o, u1_MJ, g1_EJ)
        inner = o.engine.swiglu(y1_MJ, o.p, o.a2, o.weight2, o.scale2)
        u2_MH = o.engine.linear(inner, o.weight2, o.blocks2)
        if g2_EH is not None:
            # In place: nothing else reads u2.
            o.engine.passes.gain_rows(u2_MH, g2_EH, o.routing, u2_MH)
        # Copies, so that joined rows are not kept for the sake of the columns behind them.
        s1 = None if rows.s_MR is None else rows.s_MR.contiguous()
        s2 = None if inner.s_MR is None else inner.s_MR.contiguous()
        x, p, offsets, source, slots, w1, w2, *factors = tensors
        kept_x = x if o.a1 is not None or static.recompute else None
        kept = (kept_x, p, offsets, source, slots, w1, w2, *factors)
        kept_u1 = None if static.recompute else u1_MJ
        ctx.save_for_backward(g1_EJ, g2_EH, kept_u1, s1, s2, *kept)
        ctx.static = static
        return o.engine.combine(u2_MH)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *douts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g1_EJ, g2_EH, u1_MJ, s1, s2, *kept = ctx.saved_tensors
        o = Operands(ctx.static, tuple(kept))
        dout = o.engine.dense(douts[0])
        sums = o.engine.sums(dout, o.gradient_shapes(True, o.a1 is not None, True))
        da1, da2, *db = sums.places
        db1 = db[: ctx.static.blocks[0]]
        db2 = db[ctx.static.blocks[0] :]
        # Recomputed as a whole: x was kept in its place.
        if u1_MJ is None:
            u1_MJ = o.gate_up()[0]
        y1_MJ = _scaled(o, u1_MJ, g1_EJ)
        rows1 = o.engine.buffers(y1_MJ, y1_MJ.shape[1], 0 if s1 is None else s1.shape[1], o.weight1)
        # Functions, so that what they make on the way is free again when dX is computed.
        dg2_EH = _through_down(o, dout, y1_MJ, g2_EH, s2, sums, da2, db2, rows1.x)
        del y1_MJ
        dg1_EJ = _through_gain(o, rows1.x, u1_MJ, g1_EJ)
        if o.adapter1 is not None:
            assert o.blocks1 is not None and s1 is not None
            o.engine.shrink_beside(rows1, o.blocks1, o.scale1)
            # rows1 is du1 by now.
            gradients_of_b(o, o.adapter1, s1, rows1.x, db1, None)
            o.engine.wgrad(rows1.s_MR, o.x, da1, o.routing.source_M)  # pyright: ignore[reportArgumentType]
        dp, factors = sums.finish()
        # The first adapted block of a model has inputs that nobody trains.
        dx = None
        if ctx.needs_input_grad[3]:
            dx = o.engine.combine(o.engine.dgrad(rows1, o.weight1, o.a1))
        fixed = [None] * 5  # offsets, source, slots and the two weights
        grads = (None, dg1_EJ, dg2_EH, dx, dp, *fixed, *factors)
        return tuple(
            g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=True)
        )


def _scaled(o: Operands, u_MN: torch.Tensor, g_EN: torch.Tensor | None) -> torch.Tensor:
    """y, or u itself where nothing scales it."""
    if g_EN is None:
        return u_MN
    y_MN = torch.empty_like(u_MN)
    o.engine.passes.gain_rows(u_MN, g_EN, o.routing, y_MN)
    return y_MN


def _through_down(
    o: Operands, dout: torch.Tensor, y1_MJ: torch.Tensor, g2_EH: torch.Tensor | None,
    s2: torch.Tensor | None, sums: Sums, da2: torch.Tensor | None, db2: list[torch.Tensor | None],
    dy1_MJ: torch.Tensor,
) -> torch.Tensor | None:  # fmt: skip
    """Fill dy1 and what ``sums`` has of down and of probabilities; return dg2."""
    engine = o.engine
    du2, source_M, dg2_EH = _through_gain_of_down(o, dout, y1_MJ, g2_EH)
    if o.adapter2 is not None:
        assert s2 is not None
        gradients_of_b(o, o.adapter2, s2, du2, db2, source_M)
    rows = engine.shrink(du2, o.blocks2, o.weight2, source_M, scale=o.scale2)
    dh_MI = engine.dgrad(rows, o.weight2, o.a2)
    # Without factors of gate_up, which take their gradients from du1 and not from dy1.
    engine.passes.swiglu_backward(
        dh_MI, y1_MJ, o.p, o.routing, dy1_MJ, None, rows.s_MR, sums, da2, ()
    )
    return dg2_EH


def _through_gain_of_down(
    o: Operands, dout: torch.Tensor, y1_MJ: torch.Tensor, g2_EH: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(du2, the source of its rows, dg2): from the gradient of each token's output."""
    source_M = o.routing.source_M
    if g2_EH is None:
        return dout, source_M, None
    # Down once more, as in forward.
    inner = o.engine.swiglu(y1_MJ, o.p, o.a2, o.weight2, o.scale2)
    u2_MH = o.engine.linear(inner, o.weight2, o.blocks2)
    dg2_EH = torch.empty_like(g2_EH)
    o.engine.passes.gain_gradient(dout, u2_MH, o.routing, dg2_EH, source_M)
    # Copies of a token's gradient differ from here on, so each row has its own, in u2's place.
    o.engine.passes.gain_rows(dout, g2_EH, o.routing, u2_MH, source_M)
    return u2_MH, None, dg2_EH


def _through_gain(
    o: Operands, dy_MN: torch.Tensor, u_MN: torch.Tensor, g_EN: torch.Tensor | None
) -> torch.Tensor | None:
    """dg; dy becomes du in place."""
    if g_EN is None:
        return None
    dg_EN = torch.empty_like(g_EN)
    # Before dy is overwritten.
    o.engine.passes.gain_gradient(dy_MN, u_MN, o.routing, dg_EN)
    o.engine.passes.gain_rows(dy_MN, g_EN, o.routing, dy_MN)
    return dg_EN
