"""Compare clipping and stepping without a wait of the host with Megatron's own step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.config import RunConfig
from megalora.train.optim import clip_and_step
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.runs import make_config


def after_two_steps(
    config: RunConfig, take_step: Callable[[Any], float]
) -> tuple[list[float], list[torch.Tensor]]:
    """The gradient's norm of each step, and every parameter of this rank behind them."""
    with built(config) as run:
        norms = []
        for number in range(2):
            run.stepper.train(run.batches.of_step(number), run.optimizer)
            norms.append(take_step(run.optimizer))
        return norms, [p.detach().clone() for p in run.model.parameters]


def megatrons(optimizer: Any) -> float:
    # (whether it succeeded, the norm, ...)
    return float(optimizer.step()[1])


def ours(optimizer: Any) -> float:
    return clip_and_step(optimizer).item()


# A limit below the norms of this run, one above them, and none, which Megatron writes as 0.
@pytest.mark.parametrize(
    ("clip", "dtype"),
    [(0.1, "bfloat16"), pytest.param(100.0, "float32", marks=pytest.mark.slow), (0.0, "float32")],
    ids=["clipped", "not clipped", "off"],
)
def test_a_step_has_the_bits_of_megatron_s(
    clip: float, dtype: str, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Dense and expert parameters have optimizers of their own here, one norm and one factor."""
    config = make_config(tiny, chats, tmp_path, {"ep": 2}, dtype=dtype, clip_grad=clip)
    # Two steps, so that moments and masters are those that the first one left.
    by_megatron = run_ranks(after_two_steps, 2, config, megatrons)
    by_us = run_ranks(after_two_steps, 2, config, ours)
    for found, expected in zip(by_us, by_megatron, strict=True):
        norms, parameters = found
        their_norms, their_parameters = expected
        # Roots of the same sum in float64, by Python's ** and by torch's sqrt.
        assert norms == pytest.approx(their_norms, rel=1e-12)
        # Above the smallest limit: the first case does clip.
        assert min(norms) > 0.1
        for mine, their in zip(parameters, their_parameters, strict=True):
            assert torch.equal(mine, their)
