"""Clipping and stepping without the host, against Megatron's own step."""

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
    return float(optimizer.step()[1])


def ours(optimizer: Any) -> float:
    return clip_and_step(optimizer).item()


@pytest.mark.parametrize(
    ("clip", "dtype"),
    [(0.1, "bfloat16"), (100.0, "float32"), (0.0, "float32")],
    ids=["clipped", "not clipped", "off"],
)
def test_a_step_has_the_bits_of_megatron_s(
    clip: float, dtype: str, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Dense and expert parameters have optimizers of their own here, one norm and one factor."""
    config = make_config(tiny, chats, tmp_path, {"ep": 2}, dtype=dtype, clip_grad=clip)
    theirs = run_ranks(after_two_steps, 2, config, megatrons)
    for (norms, parameters), (their_norms, their_parameters) in zip(
        run_ranks(after_two_steps, 2, config, ours), theirs, strict=True
    ):
        assert norms == pytest.approx(their_norms, rel=1e-12)
        # Above the smallest limit: the first case does clip.
        assert min(norms) > 0.1
        for mine, their in zip(parameters, their_parameters, strict=True):
            assert torch.equal(mine, their)
