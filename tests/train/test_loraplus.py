"""Train with another learning rate for B than for A, as LoRA+ does, and compare with plain
transformers and two groups of torch's AdamW, and with the groups that PEFT makes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megalora.config import CheckpointConfig, RunConfig
from megalora.train.loop import train
from megalora.train.optim import set_learning_rate
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.case import (
    LR,
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

RATIO = 16.0
# Dense and expert factors have optimizers of their own; ranks of a pipeline have other factors.
LAYOUTS = [
    Case(2, tp=2, ep=2),
    pytest.param(Case(2, pp=2), marks=pytest.mark.slow),
    pytest.param(Case(2), marks=pytest.mark.slow),
    pytest.param(Case(4, tp=2, ep=2, etp=2), marks=pytest.mark.slow),
    pytest.param(Case(4, tp=2, pp=2, ep=2), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> tuple[Path, Expected]:
    """The base, and what the oracle makes of it. It depends on no layout."""
    case = Case(1)
    base = make_model(case.model, tmp_path_factory.mktemp("loraplus") / "base")
    return base, expected_of_clear_routing(case, SHORT, base, chats, lr_b=LR * RATIO)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_two_rates_in_every_layout(case: Case, reference, chats: Path, tmp_path: Path) -> None:
    base, oracle = reference
    config, start = prepare_run(case, SHORT, base, chats, tmp_path, "float32", oracle.seed)
    config = replace(config, train=replace(config.train, loraplus_lr_ratio=RATIO))
    run_ranks(train_recording_gradients, case.world, config, start, case.head)
    row = deviations(read_run(tmp_path), oracle)
    # A step moves B by 16 times LR, so that its error is 16 times as large, too.
    row["adapters"] /= RATIO
    assert not exceeded(row), row


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(4, tp=2, pp=2, ep=2, adapter="saved")])
def test_a_rate_of_what_is_trained_whole(case: Case, chats: Path, tmp_path: Path) -> None:
    base = make_model(case.model, tmp_path / "base")
    oracle = expected_of_clear_routing(case, SHORT, base, chats, lr_whole=LR / 4)
    out = tmp_path / "run"
    config, start = prepare_run(case, SHORT, base, chats, out, "float32", oracle.seed)
    config = replace(config, train=replace(config.train, saved_lr_ratio=0.25))
    run_ranks(train_recording_gradients, case.world, config, start, case.head)
    row = deviations(read_run(out), oracle)
    assert not exceeded(row), row


def rates_of_parameters(config: RunConfig) -> dict[str, float]:
    """Learning rate of a step at half the peak by parameter name; a rank function."""
    with built(config) as run:
        set_learning_rate(run.optimizer, config.train.lr / 2, config.train.lr)
        rates: dict[int, float] = {}
        for part in run.optimizer.chained_optimizers:
            for parameter in part.model_param_group_index_map:
                group, _ = part.model_param_group_index_map[parameter]
                rates[id(parameter)] = part.optimizer.param_groups[group]["lr"]
        found = {}
        for chunk in run.model.chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad:
                    found[name] = rates[id(parameter)]
        return found


def test_groups_are_those_of_peft(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = make_config(tiny, chats, tmp_path, {}, lr=1e-3, loraplus_lr_ratio=RATIO)
    (ours,) = run_ranks(rates_of_parameters, 1, config)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(target_modules=targets))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=config.train.lr / 2, loraplus_lr_ratio=RATIO
    )
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    # Factor -> its rates; PEFT has a group for each, those without a parameter among them.
    theirs: dict[str, set[float]] = {"lora_A": set(), "lora_B": set()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            factor = "lora_A" if ".lora_A." in names[parameter] else "lora_B"
            theirs[factor].add(group["lr"])
    found: dict[str, set[float]] = {"lora_A": set(), "lora_B": set()}
    for name, rate in ours.items():
        found["lora_A" if name.endswith(".lora_A") else "lora_B"].add(rate)
    assert found == theirs == {"lora_A": {5e-4}, "lora_B": {8e-3}}


@pytest.mark.slow
def test_a_resumed_run_keeps_both_rates(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Onto another layout, where the groups hold other parts."""
    options: dict[str, Any] = {
        "loraplus_lr_ratio": RATIO,
        "schedule": "linear",
        "warmup": 2,
        "steps": 4,
    }
    whole = make_config(tiny, chats, tmp_path / "whole", {}, **options)
    run_ranks(train, 1, whole)
    half = make_config(tiny, chats, tmp_path / "half", {"tp": 2, "ep": 2}, **options)
    half = replace(half, checkpoint=CheckpointConfig(dir=str(tmp_path / "half"), every=2))
    run_ranks(train, 2, half)
    # The last two steps once more, in another layout.
    resumed = make_config(tiny, chats, tmp_path / "half", {"ep": 2}, **options)
    again = tmp_path / "half/step_000002"
    resumed = replace(
        resumed, checkpoint=CheckpointConfig(dir=str(tmp_path / "again"), resume=str(again))
    )
    run_ranks(train, 2, resumed)
    name = "step_000004/adapter_model.safetensors"
    expected = load_file(tmp_path / "whole" / name)
    found = load_file(tmp_path / "again" / name)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        # Rates of up to 16e-3 a step: rounding that Adam divides by a small root.
        torch.testing.assert_close(found[tensor], value, rtol=0, atol=2e-5)
