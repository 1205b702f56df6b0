"""Check that a step with NaN changes nothing, is written down, and does not go on for
ever."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalora.config import RunConfig
from megalora.data.order import global_batch_indices
from megalora.train import optim
from megalora.train.loop import train
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
