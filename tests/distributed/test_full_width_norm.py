"""The norm over all heads: values and gradients of any split equal float64's on one rank."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalora.config import ParallelConfig
from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape
from megalora.model.full_width_norm import KeyNorm, QueryNorm
from tests.distributed.ranks import run_ranks

# 4 key heads: at TP 4 each rank has one. OLMoE has this norm, over all heads of q and of k.
NORMS = {"queries": (QueryNorm, 12), "keys": (KeyNorm, 4)}
HEAD_DIM = 10
EPS = 1e-2  # large, so that a misplaced one shows
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""Of the largest value. bfloat16: one rounding of inputs and one of outputs, 2^-8 each, of values
up to 4."""


def _problem(num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and dy ``[S, B, heads, d]`` and the weight ``[heads * d]``, float64."""
    generator = torch.Generator().manual_seed(num_heads)
    options = {"generator": generator, "dtype": torch.float64}
    shape = (7, 3, num_heads, HEAD_DIM)
    weight = 1 + 0.3 * torch.randn(num_heads * HEAD_DIM, **options)
    return torch.randn(shape, **options), torch.randn(shape, **options), weight


def _on_ranks(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's part of y and dx."""
    kind, num_heads = NORMS[name]
    rank = dist.get_rank()
    world = dist.get_world_size()
    # As much of Megatron's TransformerConfig as the norms read.
    config = SimpleNamespace(
        num_attention_heads=12, num_query_groups=4, kv_channels=HEAD_DIM, params_dtype=dtype,
        tensor_model_parallel_size=world, _pg_collection=SimpleNamespace(tp=dist.group.WORLD),
    )  # fmt: skip
    x, dy, weight = [t.to(dtype) for t in _problem(num_heads)]
    norm = kind(HEAD_DIM, config, eps=EPS)
    norm.weight.data.copy_(weight.chunk(world)[rank])
    mine = x.chunk(world, 2)[rank].clone().requires_grad_()
    y = norm(mine)
    y.backward(dy.chunk(world, 2)[rank])
    assert mine.grad is not None
    return y.detach(), mine.grad


def _every_case() -> dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]]:
    """All norms and dtypes in the same ranks: starting these takes longer than all sums."""
    return {(name, dtype): _on_ranks(name, dtype) for name in NORMS for dtype in TOLERANCES}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients(world: int) -> None:
    ranks = run_ranks(_every_case, world)
    for name, (_, num_heads) in NORMS.items():
        x, dy, weight = _problem(num_heads)
        x.requires_grad_()
        # The mean runs over all heads together, which no rank has: ranks must sum their squares.
        flat = x.flatten(2)
        normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS) * weight
        normed.backward(dy.flatten(2))
        assert x.grad is not None
        for dtype, tolerance in TOLERANCES.items():
            parts = [of_rank[name, dtype] for of_rank in ranks]
            for found, wanted in zip(
                zip(*parts, strict=True), (normed.view_as(x), x.grad), strict=True
            ):
                whole = torch.cat(found, 2).double()
                difference = (whole - wanted).abs().max() / wanted.abs().max()
                assert difference <= tolerance, (name, dtype)


def test_more_ranks_than_key_heads_are_refused_by_name() -> None:
    shape = model_shape({**FAMILIES["olmoe"].tiny, "model_type": "olmoe"})
    # Two key heads: TP 2 gives each rank one. Beyond that other families copy key heads to several
    # ranks, but here a mean over all heads would count the copies.
    shape.check_layout(ParallelConfig(tp=2))
    with pytest.raises(ValueError, match=r"parallel.tp=6 is more than the model's 2 key/value"):
        shape.check_layout(ParallelConfig(tp=6))
