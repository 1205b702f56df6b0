"""Check ``assemble``: what is filled in is what trains, gradients are checked, nothing is read
twice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.config import RunConfig
from megalora.lora.adapted_model import AdaptedModel
from megalora.train.assemble import Inputs, assemble
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config

FILLED = 0.75
"""Exact in bfloat16."""
LR = 1e-3


def _moved_after_a_step(config: RunConfig) -> tuple[float, float]:
    """(smallest, largest) value of a B that was filled with ``FILLED``, after one step."""

    def fill(model: AdaptedModel) -> None:
        for parameter in model.parameters:
            parameter.data.fill_(FILLED)

    with assemble(config, prepare=fill) as run:
        run.step(0, LR)
        values = torch.cat([p.detach().float().flatten() for p in run.model.parameters])
        return values.min().item(), values.max().item()


def test_the_optimizer_starts_from_what_was_filled_in(tiny: Path, chats: Path, tmp_path: Path):
    """In bfloat16 it has copies of its own, made once; Adam's first step moves by at most lr."""
    config = make_config(tiny, chats, tmp_path, {}, dtype="bfloat16")
    [(smallest, largest)] = run_ranks(_moved_after_a_step, 1, config)
    # bfloat16 has 8 significant bits. A master that was made before the fill would start from A's
    # random values, or from zero.
    rounding = FILLED * 2**-8
    assert FILLED - LR - rounding <= smallest <= largest <= FILLED + LR + rounding


def _refusal(config: RunConfig) -> str:
    def never(*args: object, **options: object) -> list[Any]:
        raise AssertionError("the base was built first")

    try:
        with assemble(config, make_base=never):
            return "nothing was refused"
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("name", "torch_says"), [("flash3", "FA3"), ("flash4", "FA4")])
def test_flash_attention_that_is_not_installed_is_refused(
    name: str, torch_says: str, tiny: Path, chats: Path, tmp_path: Path
):
    """In one line, and before a base is read; ``auto`` needs nothing."""
    config = make_config(tiny, chats, tmp_path, {})
    model = replace(config.model, attention=name)  # type: ignore[arg-type]
    [said] = run_ranks(_refusal, 1, replace(config, model=model))
    assert said.startswith(f"model.attention={name}: torch cannot use {torch_says} here (No module")
    assert said.endswith("set model.attention=auto")
    assert "\n" not in said


def _error_of_a_dead_projection(config: RunConfig) -> str:
    """What the first step says when one A is zero, as a mistake of loading would leave it."""

    def kill(model: AdaptedModel) -> None:
        # The A's of q, k and v are stacked in one parameter; o has its own, and a shard says where
        # in it.
        for shard in model.shards:
            if ".layers.2.self_attn.o_proj.lora_A" in shard.name:
                shard.parameter.data[shard.index] = 0

    with assemble(config, prepare=kill) as run:
        try:
            run.step(0, LR)
        except RuntimeError as error:
            return str(error)
        return "nobody looked"


def test_a_projection_that_cannot_learn_ends_the_run(tiny: Path, chats: Path, tmp_path: Path):
    """B's gradient is that of its output times A x, so with A at zero it is exactly zero."""
    [said] = run_ranks(_error_of_a_dead_projection, 1, make_config(tiny, chats, tmp_path, {}))
    assert "the gradient of B is exactly zero for 1 of" in said and "layer 2 o_proj" in said


def _loss_of_inputs(config: RunConfig) -> float:
    """The first loss of a run whose data is gone once it has been read."""
    inputs = Inputs.read(config)
    # Reading again would raise.
    unreadable = replace(config, data=replace(config.data, train="no such file"))
    with assemble(unreadable, inputs) as run:
        return run.step(0, LR)[0]


def _loss(config: RunConfig) -> float:
    with assemble(config) as run:
        return run.step(0, LR)[0]


def test_inputs_that_were_read_are_not_read_again(tiny: Path, chats: Path, tmp_path: Path):
    config = make_config(tiny, chats, tmp_path, {})
    assert run_ranks(_loss_of_inputs, 1, config) == run_ranks(_loss, 1, config)
