"""A reference that is the adapter at the start, where the adapter begins as a part of the base
(PiSSA, OLoRA): it begins as the base, and so does PEFT's, whose residual is another base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalora.adapters.export import export
from megalora.config import CheckpointConfig, LoRAConfig, ObjectiveConfig, RunConfig
from megalora.data.splits import load_data
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.paired import pairs_of
from tests.parity.case import (
    deviations,
    exceeded,
    expected_of_clear_routing,
    limits_of,
    read_run,
    run_case,
)
from tests.parity.grid import SHORT, Case
from tests.parity.models import make_model
from tests.parity.runs import make_config, records
from tests.peft_warnings import IGNORED

pytestmark = [pytest.mark.slow, IGNORED]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BETA = 0.5


@pytest.mark.parametrize("case", [Case(1), Case(2, tp=2, ep=2), Case(2, pp=2)], ids=str)
def test_losses_and_gradients_are_those_of_float64(case: Case, chats: Path, tmp_path: Path) -> None:
    """From differences that are not zero, which the reference has, too."""
    case = replace(case, adapter="begun", objective="dpo of start")
    base = make_model(case.model, tmp_path / "base")
    oracle = expected_of_clear_routing(case, SHORT, base, chats)
    run_case(case, SHORT, base, chats, tmp_path / "run", seed=oracle.seed)
    row = deviations(read_run(tmp_path / "run"), oracle)
    assert not exceeded(row, limits_of(case)), row


def config_of(base: Path, chats: Path, out: Path, **options: Any) -> RunConfig:
    lora = LoRAConfig(rank=4, alpha=12.0, target_modules=ATTENTION, init="pissa")
    objective = ObjectiveConfig(name="dpo", beta=BETA, reference="start")
    return make_config(
        base, pairs_of(chats), out, {}, lora=lora, objective=objective, eval=6, lr=2e-3, **options
    )


@torch.no_grad()
def answers(model: Any, samples: list[Any]) -> Tensor:
    """[pairs, 2] float64: log-probabilities of chosen and rejected answers."""
    found = []
    for sample in samples:
        for part in (slice(sample.second), slice(sample.second, None)):
            ids = torch.from_numpy(sample.input_ids[part]).long()
            mask = torch.from_numpy(sample.loss_mask[part])[1:]
            logits = model(ids[None, :-1]).logits[0].double()
            own = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found.append(own[mask].sum())
    return torch.stack(found).view(-1, 2)


def test_the_start_is_that_of_peft(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Held-out loss of a run that was resumed in its middle, by stock PEFT: the adapter as it was
    exported, compared with PEFT's own PiSSA before its first step."""
    first = config_of(tiny, chats, tmp_path / "run", steps=2)
    run_ranks(train, 1, first)
    on = config_of(tiny, chats, tmp_path / "run", steps=4)
    on = replace(on, checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), resume=True))
    run_ranks(train, 1, on)
    found = records(tmp_path / "run", "eval_loss")
    # Before the first step it is its own reference.
    assert found[0] == pytest.approx(0.693147, abs=1e-5)
    export(tmp_path / "run/step_000004", tmp_path / "out")
    load: Any = AutoModelForCausalLM.from_pretrained
    policy = PeftModel.from_pretrained(load(tiny, dtype=torch.float32), str(tmp_path / "out"))
    begun = LoraConfig(
        r=4, lora_alpha=12, target_modules=ATTENTION, init_lora_weights="pissa",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    reference = get_peft_model(load(tiny, dtype=torch.float32), begun)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    _, held_out = load_data(on.data, tokenizer, objective=on.objective)
    assert held_out is not None
    samples = list(held_out.samples)
    gains = answers(policy.eval(), samples) - answers(reference.eval(), samples)
    expected = -F.logsigmoid(BETA * (gains[:, 0] - gains[:, 1])).mean().item()
    # Sums of some twenty log-probabilities, which float32 holds to 2e-6.
    assert found[-1] == pytest.approx(expected, abs=2e-5)
    assert abs(expected - 0.693147) > 5e-3
