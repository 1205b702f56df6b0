"""Differentiable collectives for tensor and sequence parallelism, on rank-wide activations.

Forward and backward are each other's transpose:

    function      forward                    backward
    gather_seq    all-gather on dim 0        reduce-scatter on dim 0
    scatter_seq   reduce-scatter on dim 0    all-gather on dim 0
    sum_over      all-reduce                 all-reduce

But for two, for what every rank computes the same loss from, which counts once:

    sum_alike     all-reduce                 the gradient as it is
    gather_alike  all-gather on dim 0        this rank's slice of the gradient

A group of one changes nothing. Tensors are ``[S, ...]``: sequence first, as everywhere in Megatron.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Parts of all ranks one after another on dim 0; not differentiable."""
    if group.size() == 1:
        return x
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _own_slice(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size())[group.rank()]


def _collective(forward_op: Callable[..., Tensor], backward_op: Callable[..., Tensor]):
    """A collective whose gradient is another one."""

    class Collective(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            return forward_op(x, group)

        @staticmethod
        def backward(ctx, *grads):
            # The group has no gradient.
            return backward_op(grads[0], ctx.group), None

    def apply(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        if group.size() == 1:
            return x
        return Collective.apply(x, group)  # pyright: ignore[reportReturnType]

    return apply


gather_seq = _collective(all_gather, _reduce_scatter)
scatter_seq = _collective(_reduce_scatter, all_gather)
sum_over = _collective(_all_reduce, _all_reduce)
sum_alike = _collective(_all_reduce, lambda gradient, group: gradient)
gather_alike = _collective(all_gather, _own_slice)


def gather_dim(x: Tensor, dim: int, group: dist.ProcessGroup, num_shards: int) -> Tensor:
    """All-gather equal shards along ``dim``; not differentiable (export, checkpoints).

    ``num_shards`` divides the group's size: with fewer shards than ranks, neighbours hold the same
    one.
    """
    if group.size() == 1:
        return x
    # [ranks, *x.shape], of which every so many-th is another shard.
    parts = all_gather(x.unsqueeze(0), group)[:: group.size() // num_shards]
    return torch.cat(parts.unbind(0), dim=dim)


def sum_bucket(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum every tensor over ``group`` in place, in one collective. All ranks must pass the same
    shapes in order."""
    if not tensors or group.size() == 1:
        return
    # One message instead of hundreds of small ones, each of which would cost a latency.
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    place = 0
    for tensor in tensors:
        summed = flat[place : place + tensor.numel()]
        tensor.copy_(summed.view_as(tensor))
        place += tensor.numel()
