"""AdamW as one kernel, as on GPUs: torch has it on the CPU, too. Compared with plain transformers
and AdamW in float64, with the unfused one, and with runs that change from one to the other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megalora.config import CheckpointConfig, RunConfig
from megalora.train import optim
from megalora.train.loop import train
from megalora.train.optim import clip_and_step
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.case import (
    Expected,
    deviations,
    exceeded,
    expected_of_clear_routing,
    prepare_run,
    read_run,
    train_recording_gradients,
)
from tests.parity.grid import SHORT, Case
from tests.parity.models import make_model
from tests.parity.runs import make_config
from tests.whole_state import gathered_state, whole_state

LAYOUTS = [
    Case(2, tp=2, ep=2),
    pytest.param(Case(2), marks=pytest.mark.slow),
    pytest.param(Case(2, pp=2), marks=pytest.mark.slow),
    pytest.param(Case(4, tp=2, ep=2, etp=2), marks=pytest.mark.slow),
]


def fused(function: Callable[..., Any], *args: Any) -> Any:
    """``function`` as a rank function, as if its rank had a GPU's optimizer."""
    with mock.patch.object(optim, "fuses", return_value=True):
        return function(*args)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> tuple[Path, Expected]:
    """The base, and what the oracle makes of it. It depends on no layout."""
    case = Case(1)
    base = make_model(case.model, tmp_path_factory.mktemp("fused") / "base")
    return base, expected_of_clear_routing(case, SHORT, base, chats)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_steps_in_every_layout(case: Case, reference, chats: Path, tmp_path: Path) -> None:
    base, oracle = reference
    config, start = prepare_run(case, SHORT, base, chats, tmp_path, "float32", oracle.seed)
    run_ranks(fused, case.world, train_recording_gradients, config, start, case.head)
    row = deviations(read_run(tmp_path), oracle)
    assert not exceeded(row), row


def after_three_steps(config: RunConfig) -> tuple[int, dict[str, list[torch.Tensor]]]:
    """(calls of the fused kernel, every parameter and moment of this rank)."""
    watched = mock.patch.object(torch, "_fused_adamw_", wraps=torch._fused_adamw_)
    with watched as kernel, built(config) as run:
        for number in range(3):
            run.stepper.train(run.batches.of_step(number), run.optimizer)
            clip_and_step(run.optimizer)
        found: dict[str, list[torch.Tensor]] = {}
        for key in ("param", "exp_avg", "exp_avg_sq"):
            state = gathered_state(run.optimizer, key, run.model.parameters, run.groups)
            found[key] = [value.clone() for value in state.values()]
        return kernel.call_count, found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_differs_from_the_unfused_by_rounding(
    dtype: str, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Groups with weight decay and a rate of their own; one call for each group of each part."""
    config = make_config(
        tiny, chats, tmp_path, {"ep": 2}, dtype=dtype, weight_decay=0.1, loraplus_lr_ratio=4.0,
    )  # fmt: skip
    plain = run_ranks(after_three_steps, 2, config)
    one = run_ranks(fused, 2, after_three_steps, config)
    for (no_calls, expected), (calls, found) in zip(plain, one, strict=True):
        # Three steps, two parts (dense and experts), two groups in each.
        assert (no_calls, calls) == (0, 12)
        for key, values in expected.items():
            for value, ours in zip(values, found[key], strict=True):
                # A few roundings, which Adam divides by a small root; in bfloat16 those of the
                # parameters change the next gradient.
                limit = 3e-5 if dtype == "float32" else 0.02
                assert (ours - value).abs().max() <= limit * value.abs().max()
                assert value.abs().max() > 0 or key != "param"


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["fused first", "unfused first"])
def test_a_run_changes_from_one_to_the_other(
    first: bool, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Two of four steps each, in two layouts: the run that went through unfused."""
    options: dict[str, Any] = {"schedule": "linear", "warmup": 2, "steps": 4, "weight_decay": 0.1}
    whole = make_config(tiny, chats, tmp_path / "whole", {}, **options)
    run_ranks(train, 1, whole)
    half = make_config(tiny, chats, tmp_path / "half", {"tp": 2, "ep": 2}, **options)
    half = replace(half, checkpoint=CheckpointConfig(dir=str(tmp_path / "half"), every=2))
    resumed = make_config(tiny, chats, tmp_path / "half", {"ep": 2}, **options)
    again = tmp_path / "half/step_000002"
    resumed = replace(
        resumed, checkpoint=CheckpointConfig(dir=str(tmp_path / "again"), resume=str(again))
    )
    if first:
        run_ranks(fused, 2, train, half)
        run_ranks(train, 2, resumed)
    else:
        run_ranks(train, 2, half)
        run_ranks(fused, 2, train, resumed)
    expected = whole_state(tmp_path / "whole/step_000004")
    found = whole_state(tmp_path / "again/step_000004")
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        # Steps of up to 1e-3 an element, which a count that begins anew makes larger by a third;
        # rounding that Adam divides by a small root. Moments are as near as gradients are.
        limit = 2e-5 if tensor.startswith("param.") else 1e-4 * value.abs().max().item()
        torch.testing.assert_close(found[tensor], value, rtol=0, atol=limit)
