"""Routing in benchmarks: balanced is even, natural is what the router chooses."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from megalora.bench.routing import even_experts
from megalora.bench.rows import BenchOptions
from megalora.bench.steps import timed_parts, training
from megalora.config import RunConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.planner.microbatch import ranks_per_token
from tests.distributed.ranks import run_ranks
from tests.parity.everything import LORA
from tests.parity.runs import make_config


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "ep", "sources"),
    [
        # 2 * 24 * 3 = 144 rows: 18 for each of 8 experts, 36 for each of 4 ranks.
        (24, 8, 3, 4, 2),
        # 3 * 7 * 5 = 105 rows: 8 or 9 for each of 12 experts. The second and third source go
        # on in the middle of a round over all experts.
        (7, 12, 5, 3, 3),
        # Every token takes every expert.
        (5, 6, 6, 1, 1),
    ],
)
def test_even_experts(tokens, experts, top_k, ep, sources) -> None:
    by_source = [even_experts(tokens, experts, top_k, source) for source in range(sources)]
    found = torch.cat(by_source)
    for row in found.tolist():
        assert len(set(row)) == top_k, "an expert is chosen twice"
    per_expert = Counter(found.flatten().tolist())
    per_rank = Counter((found // (experts // ep)).flatten().tolist())
    # All sources together: each alone may favour some experts, if the next makes up for it.
    assert len(per_expert) == experts and max(per_expert.values()) - min(per_expert.values()) <= 1
    # A last round that not all experts take part in may be one rank's alone.
    assert len(per_rank) == ep
    assert max(per_rank.values()) - min(per_rank.values()) <= experts // ep


@pytest.mark.parametrize("ep", [2, 8])
def test_even_experts_lie_on_as_many_ranks_as_a_routers_do(ep) -> None:
    """Neither all of a token's experts on one rank, nor each on another one."""
    ranks = even_experts(2000, 128, 8) // (128 // ep)
    found = sum(len(set(row)) for row in ranks.tolist()) / 2000
    # 0.1 and 0.8 is a token's standard deviation, 0.002 and 0.02 that of the mean.
    assert found == pytest.approx(ranks_per_token(128, 8, ep), rel=0.01)


def imbalances(config: RunConfig) -> dict[str, Any]:
    """Run in each rank: by routing, its imbalance (mean, worst) and the source of its tokens."""
    found = {}
    for routing in ("balanced", "natural"):
        with training(config, BenchOptions(routing=routing)) as run:  # type: ignore[arg-type]
            _, imbalance = timed_parts(run, 0, 1)
            found[routing] = (imbalance, run.batches.train.source)
    return found


@pytest.mark.parametrize(("sizes", "recompute"), [({"ep": 2}, "off"), ({"tp": 2, "ep": 2}, "full")])
def test_balanced_routing_is_even_and_natural_is_not(
    sizes, recompute, everything, chats, tmp_path
) -> None:
    """The adapter's router learns in both: ``GradientCheck`` inside would stop a run whose router
    got no gradient."""
    config = make_config(everything, chats, tmp_path, sizes, recompute, lora=LORA)
    config = replace(config, data=replace(config.data, max_length=42))
    for found in run_ranks(imbalances, 2, config):
        (mean, worst), tokens = found["balanced"]
        # Rows of a rank at least: two samples of 42 tokens, top-k rows each, over two ranks. The
        # fullest rank has at most half a last round of its experts more than the mean.
        shape = model_shape(read_hf_config(everything))
        rows = 2 * 42 * shape.top_k / 2
        assert 1 <= mean <= worst <= 1 + shape.num_experts / 4 / rows and tokens == "random"
        # A router with random weights has favourites.
        (mean, worst), tokens = found["natural"]
        assert worst >= mean > 1.02 and tokens == str(chats)
