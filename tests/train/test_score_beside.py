"""A score head beside what else a run can have: a moving average, and factors that experts
share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from megalora.adapters.files import AVERAGE_KEY, AVERAGED
from megalora.config import CheckpointConfig
from megalora.data.splits import load_data
from megalora.evaluate.judge import judge
from megalora.evaluate.request import Request, plan_of
from megalora.evaluate.verdict import Verdict
from megalora.hf.json_file import read_hf_config
from megalora.lora.init import initial_score
from megalora.model.fields import model_shape
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
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
from tests.peft_warnings import IGNORED
from tests.train.test_score_head import SCORE, config_of, in_peft, padded
from tests.whole_state import tensors_of, whole_state

pytestmark = [pytest.mark.slow, IGNORED]
DECAY = 0.7
STEPS = 3


@pytest.mark.parametrize(
    "case",
    [
        Case(2, tp=2, ep=2, objective="classify"),
        Case(4, ep=2, tp=2, etp=2, objective="reward"),
        Case(4, pp=2, ep=2, objective="classify", micro=0),
    ],
    ids=lambda case: case.name,
)
def test_experts_that_share_factors(case: Case, chats: Path, tmp_path: Path) -> None:
    """Losses, gradients and moments of plain transformers in float64."""
    case = replace(case, adapter="shared outer")
    base = make_model(case.model, tmp_path / "base")
    oracle = expected_of_clear_routing(case, SHORT, base, chats)
    run_case(case, SHORT, base, chats, tmp_path / "run", seed=oracle.seed)
    row = deviations(read_run(tmp_path / "run"), oracle)
    assert not exceeded(row, limits_of(case)), row
    assert SCORE in oracle.trained.adapter


def masters(checkpoint: Path) -> dict[str, Tensor]:
    """Float32 parameters of a checkpoint by name."""
    found = {}
    for name, value in whole_state(checkpoint).items():
        if name.startswith("param."):
            found[name.removeprefix("param.")] = value
    return found


def judged(request: Request) -> Verdict:
    """A rank function."""
    return judge(plan_of(request))


def test_an_averaged_head(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """In float64 by its definition, from the head that a run begins with; and as PEFT loads it."""
    options: dict[str, Any] = {"steps": STEPS, "lr": 1e-2, "eval": 7, "ema_decay": DECAY}
    config = config_of(tiny, chats, tmp_path / "run", parallel={"tp": 2}, **options)
    every = CheckpointConfig(dir=str(tmp_path / "run"), every=1, keep=0)
    run_ranks(train, 2, replace(config, checkpoint=every))
    shape = model_shape(read_hf_config(tiny))
    begun = initial_score(config.train.seed, 3, shape.hidden, shape.initializer_range)
    expected = begun.double()
    for step in range(1, STEPS + 1):
        now = masters(tmp_path / f"run/step_{step:06d}")[SCORE]
        expected = DECAY * expected + (1 - DECAY) * now.double()
    checkpoint = tmp_path / f"run/step_{STEPS:06d}"
    found = tensors_of(checkpoint, AVERAGE_KEY)[SCORE]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-8)
    # Another head than the last step's.
    assert (expected - masters(checkpoint)[SCORE].double()).abs().max() > 1e-3
    averaged = checkpoint / AVERAGED
    model = in_peft(tiny, averaged, 3, torch.float32)
    theirs = model.base_model.model.score.modules_to_save["default"].weight
    torch.testing.assert_close(theirs, found)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    _, held_out = load_data(config.data, tokenizer, objective=config.objective)
    assert held_out is not None
    rows = [sample.input_ids[:-1].tolist() for sample in held_out.samples]
    labels = torch.tensor([int(sample.value) for sample in held_out.samples])
    ids, mask = padded(rows, tokenizer.pad_token_id, "right")
    with torch.no_grad():
        scores = model(input_ids=ids, attention_mask=mask).logits
    # By the config of its run, which evaluates the same seven samples.
    (verdict,) = run_ranks(judged, 1, Request(target=str(averaged)))
    one = verdict.judged["adapter"]
    assert one.loss == pytest.approx(F.cross_entropy(scores, labels).item(), abs=3e-5)
    share = (scores.argmax(1) == labels).float().mean().item()
    assert one.others["accuracy"] == pytest.approx(share) and one.count == 7
