"""Check that every adapter tensor of the table exists on some rank, and that none is without
gradient."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalora.config import RunConfig
from megalora.lora.coverage import GradientCheck, check_coverage
from megalora.train.assemble import Run
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.runs import make_config

# The tiny MoE has 8 experts: at EP 2 the second rank holds 4 to 7.
EXPERT = "base_model.model.model.layers.1.mlp.experts.5.up_proj.lora_B.weight"


def said_by(config: RunConfig, act: Callable[[Run], Any]) -> str:
    """The error of ``act`` on this rank, empty where there is none."""
    # Returned and not raised: the test looks at what every rank says, not at the first failure.
    with built(config) as run:
        try:
            act(run)
        except RuntimeError as error:
            return str(error)
        return ""


def with_one_less(run: Run) -> None:
    without_one = [shard for shard in run.model.shards if shard.name != EXPERT]
    check_coverage(run.model.adapted, without_one)


def with_one_more(run: Run) -> None:
    shards = list(run.model.shards)
    # Rank 0 sees nothing wrong with its own shards, and must fail all the same: a rank that went on
    # alone would wait in the next collective for ever.
    if dist.get_rank() == 1:
        shards.append(
            replace(shards[0], name="base_model.model.model.layers.9.mystery.lora_A.weight")
        )
    check_coverage(run.model.adapted, shards)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda run: check_coverage(run.model.adapted, run.model.shards), ""),
        (with_one_less, f"1 adapter tensors were not adapted: {EXPERT}"),
        (
            with_one_more,
            (
                "1 adapter tensors should not exist:"
                " base_model.model.model.layers.9.mystery.lora_A.weight"
            ),
        ),
    ],
    ids=["all", "one less", "one more"],
)
def test_every_rank_names_what_is_missing_or_too_much(
    act, message, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Experts are on one of the two ranks each; what is missing there is missing everywhere."""
    config = make_config(tiny, chats, tmp_path, {"ep": 2})
    assert run_ranks(said_by, 2, config, act) == [message] * 2


def with_dead(factor: str, pattern: str, b_has_moved: bool) -> Callable[[Run], None]:
    """Give every factor a gradient of ones, but zeros to those of the modules of ``pattern``."""

    def act(run: Run) -> None:
        # Megatron accumulates into main_grad, and the check reads it instead of .grad.
        for shard in run.model.shards:
            shard.parameter.main_grad = torch.ones_like(shard.parameter, dtype=torch.float32)
        # A second loop: shards share parameters, so ones of a later shard would undo the zeros.
        # The index selects what is the shard's own, such as the rows of one expert.
        for shard in run.model.shards:
            if re.search(rf"{pattern}\.lora_{factor}", shard.name):
                shard.parameter.main_grad[shard.index] = 0
        check = GradientCheck(run.model.adapted, run.model.shards)
        check.after_backward(b_has_moved)

    return act


@pytest.mark.parametrize(
    ("factor", "pattern", "b_has_moved", "label"),
    [
        # B learns from the first step on: dL/dB = scale * dy (A x)^T, and A is random.
        ("B", r"layers\.2\.self_attn\.k_proj", False, "layer 2 k_proj"),
        # q, k and v share a stacked parameter, of which k has some rows.
        ("A", r"layers\.2\.self_attn\.k_proj", True, "layer 2 k_proj"),
        ("A", r"layers\.1\.mlp\.experts\.\d+\.up_proj", True, "layer 1 up_proj"),
        # dL/dA has the factor B^T: zero is right as long as B is.
        ("A", r"layers\.2\.self_attn\.k_proj", False, None),
        # All experts of the second rank: a batch may send it no token, so the layer's others count.
        ("B", r"layers\.1\.mlp\.experts\.[4-7]\.up_proj", False, None),
    ],
)
def test_a_projection_without_gradient_is_named(
    factor, pattern, b_has_moved, label, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    act = with_dead(factor, pattern, b_has_moved)
    config = make_config(tiny, chats, tmp_path, {"ep": 2})
    for said in run_ranks(said_by, 2, config, act):
        if label is None:
            assert said == ""
        else:
            # 4 layers with 7 projections each; experts of a layer count as one.
            assert said.startswith(
                f"the gradient of {factor} is exactly zero for 1 of 28 adapted projections"
                f" ({label})"
            )
