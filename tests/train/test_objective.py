"""Options of the objective reach the training step, in every layout alike; evaluations do without
them."""

from pathlib import Path
from typing import Any

import pytest

from megalora.config import RunConfig
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.runs import make_config


def reported(config: RunConfig) -> dict[str, float]:
    """What a step at a learning rate of zero reports, and an evaluation of the same rows."""
    with built(config) as run:
        loss, _ = run.step(0, 0.0)
        evaluation, _ = run.stepper.evaluate(run.batches.of_step(0))
        return {"loss": loss, "evaluation": evaluation, **run.others}


@pytest.mark.slow
def test_options_of_the_loss_reach_the_step(tiny: Path, chats: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"z_loss": 0.01, "label_smoothing": 0.2}
    (plain,) = run_ranks(reported, 1, make_config(tiny, chats, tmp_path, {}))
    assert plain.keys() == {"loss", "evaluation"}
    (found,) = run_ranks(reported, 1, make_config(tiny, chats, tmp_path, {}, **options))
    assert found.keys() == {"loss", "evaluation", "cross_entropy", "z_loss"}
    # B is zero: the model is the base, in training and in evaluation.
    assert plain["evaluation"] == pytest.approx(plain["loss"], rel=1e-6)
    for name in ("cross_entropy", "evaluation"):
        assert found[name] == pytest.approx(plain["loss"], rel=1e-6)
    # Logits of a model that knows nothing: lse is near log V, and so is the smoothed loss.
    assert found["z_loss"] == pytest.approx(0.01 * plain["loss"] ** 2, rel=0.1)
    assert found["loss"] - found["z_loss"] == pytest.approx(plain["loss"], rel=0.05)
    assert found["loss"] - found["z_loss"] != pytest.approx(plain["loss"], rel=1e-5)
    # Vocabulary, layers and samples divided: the same numbers.
    parallel = {"tp": 2, "pp": 2}
    for of_rank in run_ranks(reported, 4, make_config(tiny, chats, tmp_path, parallel, **options)):
        assert of_rank == pytest.approx(found, rel=1e-6)
