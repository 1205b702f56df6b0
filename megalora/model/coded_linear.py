"""Megatron's parallel linears on codes: the weight is decoded in forward and again in backward.

    y = x Wᵀ + bias        dx = dy W

Values and gradients are those of Megatron's frozen linears on the decoded weight, bit for bit.

tensor   shape on one rank                       across TP
codes    of W [out/t, in] or [out, in/t]         dim 0 (column) or dim 1 (row)
bias     as in Megatron's linear of that kind
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megalora import host
from megalora.model.formats.coded import Coded
from megalora.model.held_codes import HeldCodes


class _Linear(torch.autograd.Function):
    """``LinearWithFrozenWeight`` of Megatron, which would keep the decoded weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, held: HeldCodes, bias: Tensor | None, reduces: bool, group: Any
    ) -> Tensor:
        ctx.held = held
        ctx.reduces = reduces
        ctx.group = group
        out = torch.matmul(x, held.decoded()[0].t())
        return out if bias is None else out + bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        weight = ctx.held.decoded()[0]
        dx = dy.reshape(-1, dy.shape[-1]).matmul(weight)
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
        # Each rank has the sum over its own outputs: dx = sum over ranks of dy_r W_r.
        if ctx.reduces:
            torch.distributed.all_reduce(dx, group=ctx.group)
        return dx, None, None, None, None


class _Coded(nn.Module):
    """What both kinds share."""

    held: HeldCodes

    def hold(self, how: Coded) -> None:
        """Keep codes in place of the weight that Megatron has made, whose values are not set."""
        weight: Any = self.weight
        sizes = (1, *weight.shape)
        # Freed first: the decoded weight has memory elsewhere.
        self.weight = None
        self.held = how.allocate(sizes, weight.dtype, host.device())

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **_: Any,
    ) -> Tensor:
        # Megatron's arguments; the others are about weight gradients.
        if sequence_parallel:
            # Backward scatters the sum over ranks: each has part of every token's dx.
            input = gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True, group=tp_group
            )
        return _Linear.apply(input, self.held, bias, allreduce_dgrad, tp_group)  # pyright: ignore


class CodedColumnParallelLinear(_Coded, ColumnParallelLinear):
    """Megatron's column-parallel linear on codes."""

    def __init__(self, *args: Any, how: Coded, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hold(how)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron wants a weight of the right sizes, of which ``_forward_impl`` reads none.
        like = self.held.operand().like[0]
        return super().forward(input_, like, *args, **kwargs)


class CodedRowParallelLinear(_Coded, RowParallelLinear):
    """Megatron's row-parallel linear on codes."""

    def __init__(self, *args: Any, how: Coded, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=bias, **kwargs)
        self.hold(how)


def base_weight_of(linear: Any) -> Tensor:
    """The frozen weight ``[out, in]`` of a linear; of a coded one valid until another weight is
    decoded."""
    held = getattr(linear, "held", None)
    return linear.weight if held is None else held.decoded()[0]
