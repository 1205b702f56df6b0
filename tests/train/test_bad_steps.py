"""Check that a step with NaN changes nothing, is written down, and does not go on for
ever."""

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megalora.adapters.files import WEIGHTS
from megalora.config import CheckpointConfig, RunConfig, SkipSpikes
from megalora.config.train import Relora
from megalora.data.order import global_batch_indices
from megalora.train import optim
from megalora.train.loop import train
from megalora.train.spikes import LossSpikes
from megalora.train.step import Stepper
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import same_files, with_checkpoints
from tests.parity.runs import make_config, records

NAN_NORM = 2
NAN_LOSS = 3
"""Steps that go wrong, from 1."""


def _train_with_two_bad_steps(config: RunConfig) -> None:
    """A rank function. What is computed is right; what is made of it is not."""
    norms = itertools.count(1)
    losses = itertools.count(1)
    norm_of = optim._norm
    forward_backward = Stepper.forward_backward

    def norm(*arguments: Any) -> torch.Tensor:
        found = norm_of(*arguments)
        return found * torch.nan if next(norms) == NAN_NORM else found

    def loss(self: Stepper, *arguments: Any) -> torch.Tensor:
        sums = forward_backward(self, *arguments)
        return sums * torch.nan if next(losses) == NAN_LOSS else sums

    # The rank's process ends with the test, so nothing puts these back.
    optim._norm = norm
    Stepper.forward_backward = loss
    train(config)


def made(tiny: Path, chats: Path, folder: Path, limit: int) -> RunConfig:
    config = make_config(tiny, chats, folder, {}, steps=4, max_bad_steps=limit, weight_decay=0.1)
    config = replace(config, data=replace(config.data, eval=None))
    return with_checkpoints(config, every=1, keep=4)


def test_bad_steps_change_nothing(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = made(tiny, chats, tmp_path, 2)
    run_ranks(_train_with_two_bad_steps, 1, config)
    # Adapters, moments and masters.
    for bad in (NAN_NORM, NAN_LOSS):
        same_files(tmp_path / "step_000001", tmp_path / f"step_{bad:06d}")
    before = load_file(tmp_path / "step_000003/adapter_model.safetensors")
    after = load_file(tmp_path / "step_000004/adapter_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Neither is a point of a curve.
    assert len(records(tmp_path, "loss")) == 2
    entries = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [NAN_NORM, NAN_LOSS]
    assert entries[0]["grad_norm"] == "nan" and entries[1]["loss"] == "nan"
    num_samples = len(chats.read_text().splitlines())
    for entry in entries:
        numbers = global_batch_indices(entry["step"] - 1, 8, num_samples, 0)
        assert entry["samples"] == sorted(numbers.tolist())


def test_one_more_than_allowed_ends_the_run(tiny: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"step 3: the loss is nan. Lower train.lr .*\(1\) allow"):
        run_ranks(_train_with_two_bad_steps, 1, made(tiny, chats, tmp_path, 1))
    assert (tmp_path / "latest").read_text().strip() == "step_000002"


def _train_with_bad_losses(config: RunConfig, bad: set[int], first: int) -> None:
    """A rank function; ``first``: the first step that is taken, from 1."""
    steps = itertools.count(first)
    forward_backward = Stepper.forward_backward

    def loss(self: Stepper, *arguments: Any) -> torch.Tensor:
        sums = forward_backward(self, *arguments)
        return sums * torch.nan if next(steps) in bad else sums

    Stepper.forward_backward = loss
    train(config)


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        # The first step as well, when Adam has no moments yet.
        ({"ema_decay": 0.5}, {1, 3}),
        # A merge begins to count anew: of the second cycle no step is left out.
        pytest.param({"relora": Relora(every=2)}, {1}, marks=pytest.mark.slow),
    ],
    ids=["average", "relora"],
)
def test_a_run_resumed_behind_bad_steps_is_the_one_that_went_on(
    options: dict[str, Any], bad: set[int], tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Adam corrects its moments by the steps that were taken, not by those that were run."""
    whole = made(tiny, chats, tmp_path / "whole", 2)
    whole = replace(whole, train=replace(whole.train, **options))
    run_ranks(_train_with_bad_losses, 1, whole, bad, 1)
    # The average, too, stays as it is.
    if 3 in bad:
        same_files(tmp_path / "whole/step_000002", tmp_path / "whole/step_000003")
        averages = [tmp_path / f"whole/step_{step:06d}/ema/{WEIGHTS}" for step in (2, 3, 4)]
        at_2, at_3, at_4 = (path.read_bytes() for path in averages)
        assert at_2 == at_3 != at_4
    before = str(tmp_path / "whole/step_000003")
    resumed = replace(
        whole, checkpoint=replace(whole.checkpoint, dir=str(tmp_path / "resumed"), resume=before)
    )
    run_ranks(_train_with_bad_losses, 1, resumed, bad, 4)
    same_files(tmp_path / "whole/step_000004", tmp_path / "resumed/step_000004")


@pytest.mark.parametrize(("sigma", "window"), [(2.0, 7), (6.0, 128), (1.0, 2)])
def test_which_losses_are_spikes(sigma: float, window: int) -> None:
    """Against numpy: mean and deviation of the losses before, as in OLMo-core."""
    chance = np.random.default_rng(3)
    losses = chance.normal(2, 0.1, 400) + chance.choice([0, 2.0], 400, p=[0.99, 0.01])
    spikes = LossSpikes(SkipSpikes(sigma=sigma, window=window))
    found = 0
    for step, loss in enumerate(losses):
        before = losses[max(0, step - window) : step]
        has_enough = len(before) >= max(2, window // 2)
        is_spike = has_enough and loss > before.mean() + sigma * before.std(ddof=1)
        assert (spikes.take(float(loss)) is not None) == is_spike, step
        found += is_spike
        # As a checkpoint keeps them.
        if step % 50 == 49:
            again = LossSpikes(spikes.options)
            again.resume(json.loads(json.dumps(spikes.losses)))
            spikes = again
    assert 0 < found < 200
    assert LossSpikes(None).take(1e9) is None


SPIKE = 6
"""The step whose loss is large, from 1."""


def _train_with_a_spike(config: RunConfig, first: int, ranks: tuple[int, ...] = (0, 1)) -> Any:
    """A rank function; ``first``: the first step that is taken. Only these ranks find the spike."""
    steps = itertools.count(first)
    forward_backward = Stepper.forward_backward

    def loss(self: Stepper, *arguments: Any) -> torch.Tensor:
        sums = forward_backward(self, *arguments)
        if next(steps) == SPIKE and dist.get_rank() in ranks:
            sums[0, 0] *= 3
        return sums

    Stepper.forward_backward = loss
    # Ranks that do not agree wait for each other.
    signal.alarm(200)
    train(config)


def with_spikes(tiny: Path, chats: Path, folder: Path, **checkpoint: Any) -> RunConfig:
    spikes = SkipSpikes(sigma=8.0, window=4)
    config = make_config(tiny, chats, folder, {}, steps=8, max_bad_steps=1, skip_spikes=spikes)
    config = replace(config, data=replace(config.data, eval=None))
    return replace(config, checkpoint=CheckpointConfig(dir=str(folder), **checkpoint))


def test_a_spike_changes_nothing_and_a_resumed_run_knows_it(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    whole = with_spikes(tiny, chats, tmp_path / "whole", every=1, keep=0)
    run_ranks(_train_with_a_spike, 1, whole, 1)
    same_files(tmp_path / "whole/step_000005", tmp_path / "whole/step_000006")
    # Resumed right before it: without the losses before, nothing would be a spike yet.
    before = str(tmp_path / "whole/step_000005")
    resumed = with_spikes(tiny, chats, tmp_path / "resumed", resume=before)
    run_ranks(_train_with_a_spike, 1, resumed, SPIKE)
    same_files(tmp_path / "whole/step_000008", tmp_path / "resumed/step_000008")
    for run in ("whole", "resumed"):
        (entry,) = map(json.loads, (tmp_path / run / "bad_steps.jsonl").read_text().splitlines())
        assert entry["step"] == SPIKE and float(entry["loss"]) > 8 and len(entry["samples"]) == 8
    # The spike is one of the losses of later steps.
    state = json.loads((tmp_path / "whole/step_000008/training_state/state.json").read_text())
    assert len(state["recent_losses"]) == 4 and float(entry["loss"]) in state["recent_losses"]


@pytest.mark.slow
def test_all_ranks_leave_out_what_one_finds_a_spike(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Their sums may differ in the last bit, at which a limit may lie: here by more."""
    config = with_spikes(tiny, chats, tmp_path, every=1, keep=0)
    run_ranks(_train_with_a_spike, 2, config, 1, (1,))
    same_files(tmp_path / "step_000005", tmp_path / "step_000006")
    (entry,) = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    assert entry["step"] == SPIKE
