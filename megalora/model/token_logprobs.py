"""Log-probabilities of given tokens from hidden states, chunk by chunk: the fast path of
``head.py`` for a frozen output layer, and for one with an adapter.

    l = x W^T (+ h B^T)     logprob = l_y - lse     lse = log sum_v exp l_v     mean = sum_v l_v / V

The vocabulary is divided over the tensor-parallel group, so every gradient with respect to x and h
is this rank's part of a sum over it; that of B is whole.

W is frozen. Without an adapter only x has a gradient, linear in what comes in for each token:

    dx = (g_lse - g_logprob) d + g_lse W_y + g_mean sum_v W_v / V        d = (p - onehot_y) W

Forward makes d while the logits are there, backward scales its rows: two matrix products, as many
as a loss over whole logits takes. d is made with the one-hot in it: p W - W_y would lose all digits
of a token that the model is sure of once p W is rounded to bfloat16.

With an adapter, dB sums over tokens weighted with g, which only backward knows: it computes each
chunk's logits again, three products in all. So it does where W is trained, or some of its rows:

    dW = sum over tokens of (g_logprob (onehot_y - p) + g_lse p + g_mean / V) x^T

Legend: N tokens of the call, C tokens of a chunk, H hidden, V entries of this rank's vocabulary,
R rank of the adapter, K trained rows of W.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megalora.model.chunk_logits import chunk_of, weighted_gradient, wide
from megalora.model.vocab_logits import columns_of


def chunks(num_tokens: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` tokens; an empty one where there are none."""
    for begin in range(0, max(1, num_tokens), size):
        yield slice(begin, min(begin + size, num_tokens))


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """Rows of the output weight that are trained and that stand in place of the weight's own."""

    rows_KH: Tensor
    """[K, H]; the weight itself where it is trained whole."""
    columns_K: Tensor | None
    """[K] int64: this rank's columns of the logits that the rows make; None for the whole
    weight."""


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, group: ProcessGroup,
        size: int, with_mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        results = x_NH.new_empty(3, len(x_NH), dtype=wide(x_NH.dtype))
        unit_NH = torch.empty_like(x_NH) if ctx.needs_input_grad[0] else None
        for part in chunks(len(x_NH), size):
            chunk = chunk_of(targets_N[part], group, with_mean, x_NH[part], weight_VH)
            results[:, part] = chunk.results
            if unit_NH is not None:
                d_CV = chunk.gradient(targets_N[part], group, x_NH.dtype)
                torch.mm(d_CV, weight_VH, out=unit_NH[part])
                del d_CV
            # Or the next chunk's logits would lie beside these.
            del chunk
        ctx.save_for_backward(unit_NH, weight_VH, targets_N)
        ctx.group = group
        ctx.size = size
        # A result that the loss does not read has no gradient, and costs nothing.
        ctx.set_materialize_grads(False)
        return results[0], results[1], results[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        unit_NH, weight_VH, targets_N = ctx.saved_tensors
        g_logprob, g_lse, g_mean = grads
        dx_NH = torch.empty_like(unit_NH)
        if g_logprob is not None and g_lse is None and g_mean is None:
            # The product is rounded once, from float32, and no tensor in float32 is made.
            torch.mul(unit_NH, -g_logprob[:, None], out=dx_NH)
            return dx_NH, None, None, None, None, None
        width = len(weight_VH)
        sums = wide(weight_VH.dtype)
        mean_H = weight_VH.sum(0, dtype=sums) / (width * ctx.group.size())
        for part in chunks(len(unit_NH), ctx.size):
            unit = unit_NH[part].to(sums)
            dx = torch.zeros_like(unit)
            if g_logprob is not None:
                dx -= g_logprob[part, None] * unit
            if g_lse is not None:
                # p W is d + W_y; each rank adds its own rows of W, as each has its own part of d.
                columns, here = columns_of(targets_N[part], ctx.group.rank() * width, width)
                own_rows = weight_VH[columns] * here[:, None]
                dx += g_lse[part, None] * (unit + own_rows)
            if g_mean is not None:
                dx += g_mean[part, None] * mean_H
            dx_NH[part] = dx
        return dx_NH, None, None, None, None, None


class _Trained(torch.autograd.Function):
    """With an adapter (h and B), trained rows, or both."""

    @staticmethod
    def forward(
        ctx: Any, x_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, group: ProcessGroup,
        size: int, with_mean: bool, h_NR: Tensor | None, b_VR: Tensor | None,
        rows_KH: Tensor | None, columns_K: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        results = x_NH.new_empty(3, len(x_NH), dtype=wide(x_NH.dtype))
        for part in chunks(len(x_NH), size):
            operands = (x_NH[part], weight_VH, _part(h_NR, part), b_VR, rows_KH, columns_K)
            chunk = chunk_of(targets_N[part], group, with_mean, *operands)
            results[:, part] = chunk.results
            # Freed before the next chunk's are made.
            del chunk
        ctx.save_for_backward(
            x_NH, weight_VH, targets_N, h_NR, b_VR, rows_KH, columns_K, results[1]
        )
        ctx.group = group
        ctx.size = size
        ctx.set_materialize_grads(False)
        return results[0], results[1], results[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_NH, weight_VH, targets_N, h_NR, b_VR, rows_KH, columns_K, lse_N = ctx.saved_tensors
        nothing_N = torch.zeros_like(lse_N)
        g_logprob, g_lse = [nothing_N if g is None else g for g in grads[:2]]
        g_mean = grads[2]
        # With nothing adapted below the head, x has no use for a gradient.
        dx_NH = torch.empty_like(x_NH) if ctx.needs_input_grad[0] else None
        # Those of B and of rows are sums over chunks, which bfloat16 would round at each.
        dh_NR: Any = None
        db_VR: Any = None
        if h_NR is not None:
            dh_NR = torch.empty_like(h_NR)
            db_VR = torch.zeros_like(b_VR, dtype=lse_N.dtype)
        drows_KH: Any = None
        if rows_KH is not None:
            drows_KH = torch.zeros_like(rows_KH, dtype=lse_N.dtype)
        for part in chunks(len(x_NH), ctx.size):
            h_CR = _part(h_NR, part)
            operands = (x_NH[part], weight_VH, h_CR, b_VR, rows_KH, columns_K)
            of_chunk = (g_logprob[part], g_lse[part], _part(g_mean, part))
            rounded_CV = weighted_gradient(
                targets_N[part], ctx.group, lse_N[part], of_chunk, *operands
            )
            if h_CR is not None and b_VR is not None:
                torch.mm(rounded_CV, b_VR, out=dh_NR[part])
                db_VR += rounded_CV.t() @ h_CR
            # Last: with trained rows it is overwritten.
            if rows_KH is not None:
                dx_CH = _back_through_rows(rounded_CV, x_NH[part], weight_VH, rows_KH, columns_K,
                                           drows_KH)  # fmt: skip
                if dx_NH is not None:
                    dx_NH[part] = dx_CH
            elif dx_NH is not None:
                torch.mm(rounded_CV, weight_VH, out=dx_NH[part])
            # As in forward.
            del rounded_CV
        return (
            dx_NH, None, None, None, None, None,
            dh_NR, _rounded(db_VR, x_NH), _rounded(drows_KH, x_NH), None,
        )  # fmt: skip


def _part(of_tokens: Tensor | None, part: slice) -> Tensor | None:
    return None if of_tokens is None else of_tokens[part]


def _rounded(total: Tensor | None, like: Tensor) -> Tensor | None:
    return None if total is None else total.to(like.dtype)


def _back_through_rows(
    d_CV: Tensor, x_CH: Tensor, weight_VH: Tensor, rows_KH: Tensor, columns_K: Tensor | None,
    drows_KH: Tensor,
) -> Tensor:  # fmt: skip
    """Add a chunk's gradient of the trained rows to ``drows_KH``; returns that of x. Consumes
    ``d_CV``."""
    if columns_K is None:
        drows_KH += d_CV.t() @ x_CH
        return d_CV @ rows_KH
    d_CK = d_CV[:, columns_K]
    drows_KH += d_CK.t() @ x_CH
    # Where a trained row made the logit, the weight's own row took no part in it.
    return d_CV.index_fill_(1, columns_K, 0) @ weight_VH + d_CK @ rows_KH


def token_logprobs(
    x_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, group: ProcessGroup, size: int,
    *, with_mean: bool = False, h_NR: Tensor | None = None, b_VR: Tensor | None = None,
    trained: TrainedRows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(log-probability of each token, logsumexp, mean logit), each ``[N]`` in float32 or wider, on
    every rank of ``group``.

    Args:
        x_NH: all N tokens on every rank.
        weight_VH: this rank's rows of the output weight; ranks hold them in order. It gets no
            gradient.
        targets_N: int64 token ids of the whole vocabulary.
        size: tokens of a chunk.
        with_mean: whether the mean logit is wanted; it is zeros otherwise.
        h_NR, b_VR: A x of the output layer's adapter on all tokens, and this rank's rows of its B,
            scale folded in.
        trained: rows of the output weight that are trained, with gradients.
    """
    if h_NR is None and trained is None:
        results: Any = _Frozen.apply(x_NH, weight_VH, targets_N, group, size, with_mean)
        return results
    rows_KH = None if trained is None else trained.rows_KH
    columns_K = None if trained is None else trained.columns_K
    results = _Trained.apply(
        x_NH, weight_VH, targets_N, group, size, with_mean, h_NR, b_VR, rows_KH, columns_K
    )
    return results
