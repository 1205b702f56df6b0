"""The checkpoint of the lowest evaluation loss is kept and named, and a run ends when its patience
does: with losses that a test decides, against transformers' own callback."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from megalora.adapters.best_loss import BestLoss, Evaluations
from megalora.adapters.latest import latest_adapter
from megalora.adapters.training_state import read_state
from megalora.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from megalora.objectives.sft import SFT
from megalora.train.announce import closing
from megalora.train.batches import Batches
from megalora.train.loop import Progress, _evaluate, train
from megalora.train.step import Stepper
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl
from tests.parity.runs import make_config
from tests.whole_state import sum_anew

NAN = math.nan


def stop_of_transformers(
    losses: Sequence[float], patience: int, arguments: TrainingArguments
) -> int | None:
    """Number of the evaluation, from 1, after which transformers' trainer would stop. Between two
    the trainer keeps the lowest loss in its state, by ``numpy.less``, as is done here."""
    callback = EarlyStoppingCallback(early_stopping_patience=patience)
    state = TrainerState()
    control = TrainerControl()
    for number, loss in enumerate(losses, start=1):
        callback.on_evaluate(arguments, state, control, metrics={"eval_loss": loss})
        if control.should_training_stop:
            return number
        best = math.inf if state.best_metric is None else state.best_metric
        if np.less(loss, best):
            state.best_metric = loss
    return None


def test_patience_is_that_of_transformers(tmp_path: Path) -> None:
    """Random losses of a few values, so that equal ones are frequent. A NaN before any number is
    left out: transformers takes the first loss for a good one, whatever it is."""
    generator = np.random.default_rng(0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), metric_for_best_model="loss", greater_is_better=False
    )
    stops = set()
    for _ in range(200):
        losses = [float(loss) for loss in generator.integers(1, 9, size=12)]
        for place in generator.integers(1, 12, size=2):
            losses[place] = NAN
        patience = int(generator.integers(1, 10))
        best = BestLoss()
        stop = None
        for number, loss in enumerate(losses, start=1):
            best = best.followed_by(10 * number, loss)
            if best.is_out_of(patience):
                stop = number
                break
        assert stop == stop_of_transformers(losses, patience, arguments)
        stops.add(stop)
        seen = losses[: stop or len(losses)]
        lowest = min(loss for loss in seen if loss == loss)
        assert (best.loss, best.step) == (lowest, 10 * (seen.index(lowest) + 1))
    assert len(stops) > 5 and None in stops


def test_a_loss_that_is_no_number_is_never_the_lowest() -> None:
    best = BestLoss()
    for loss in (NAN, math.inf):
        best = best.followed_by(1, loss)
    assert best == BestLoss(None, 0, 2) and best.is_out_of(2)
    assert not best.is_out_of(0)


def with_losses(config: RunConfig, losses: dict[int, float], spread: float = 0.0) -> Any:
    """A rank function: train, with these losses by number of the evaluation in this process.

    Args:
        spread: added once on the second rank, twice on the third, ...
    """
    own = Stepper.evaluate_all
    asked: list[int] = []

    def evaluate(self: Stepper, *batches: Any) -> tuple[dict[str, float], int]:
        # The model is evaluated all the same, as collectives must match.
        _, count = own(self, *batches)
        asked.append(len(asked))
        loss = losses[asked[-1]] + spread * dist.get_rank()
        return {self.objective.evaluated[0]: loss}, count

    Stepper.evaluate_all = evaluate  # type: ignore[method-assign]
    try:
        return train(config)
    finally:
        Stepper.evaluate_all = own  # type: ignore[method-assign]


def following(
    base: Path, chats: Path, folder: Path, *, steps: int = 6, patience: int = 0, **checkpoint: Any
) -> RunConfig:
    """Evaluated at every step."""
    config = make_config(
        base, chats, folder, {}, steps=steps, eval_every=1, patience=patience, micro_batch_size=1
    )
    return replace(config, checkpoint=CheckpointConfig(dir=str(folder), **checkpoint))


def test_what_is_said_of_a_lowest_loss_whose_checkpoint_is_elsewhere(tmp_path: Path) -> None:
    """A run that goes on from another's checkpoint counts its evaluations on."""
    options = CheckpointConfig(dir=str(tmp_path), keep_best=True)
    config = RunConfig(
        model=ModelConfig(path="base"), data=DataConfig(train="x.jsonl"),
        train=TrainConfig(steps=3), checkpoint=options,
    )  # fmt: skip
    saved = tmp_path / "step_000003"
    saved.mkdir()
    here = closing(3, 3, saved, BestLoss(1.5, 3), config)
    assert here.endswith("step_000003, the one of the lowest eval loss step_000003 (best)")
    elsewhere = closing(3, 3, saved, BestLoss(1.5, 2), config)
    assert elsewhere.endswith("; the checkpoint of the lowest eval loss, of step 2, is not there")


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("step_*"))


@pytest.mark.slow
def test_the_best_is_kept_beside_the_newest_and_the_run_ends_early(
    tiny: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The evaluation of the base counts for neither, an equal loss is no new one, NaN is none."""
    config = following(tiny, chats, tmp_path, patience=3, keep_best=True, keep=1)
    losses = [0.5, 4.0, 3.0, 3.0, NAN, 3.5]
    last = run_ranks(with_losses, 1, config, dict(enumerate(losses)))[0]
    assert last == tmp_path / "step_000005"
    # Step 1 was the lowest once, and was forgotten when step 2 was lower.
    assert names_in(tmp_path) == ["step_000002", "step_000005"]
    assert (tmp_path / "latest").read_text() == "step_000005\n"
    assert latest_adapter(tmp_path / "best") == tmp_path / "step_000002"
    said = " ".join(capfd.readouterr().out.split())
    assert (
        "ended early by train.patience=3 (3 evaluations without a new lowest loss; the lowest is"
        f" 3.0000 of step 2) at step 5; the adapter is {tmp_path}/step_000005, the one of the"
        " lowest eval loss step_000002 (best)"
    ) in said
    state = read_state(tmp_path / "step_000005").evaluations
    assert (state.best, state.last_step) == (BestLoss(3.0, 2, 3), 5)


@pytest.mark.slow
def test_a_resumed_run_counts_on(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Cut into pieces, a run ends where it ends in one piece; once ended, it does not go on."""
    losses = [9.0, 4.0, 3.0, 5.0, 3.5, 3.1, 2.0]
    whole = following(tiny, chats, tmp_path / "whole", patience=3, keep_best=True, keep=1)
    run_ranks(with_losses, 1, whole, dict(enumerate(losses)))
    cut = following(tiny, chats, tmp_path / "cut", steps=3, patience=3, keep_best=True, keep=1)
    run_ranks(with_losses, 1, cut, dict(enumerate(losses)))
    (tmp_path / "cut/best").unlink()  # as if it had been killed before
    rest = replace(
        cut,
        train=replace(cut.train, steps=6),
        checkpoint=replace(cut.checkpoint, resume=True),
    )
    run_ranks(with_losses, 1, rest, dict(enumerate(losses[4:])))
    for name in ("whole", "cut"):
        assert names_in(tmp_path / name) == ["step_000002", "step_000005"], name
        assert (tmp_path / name / "best").read_text() == "step_000002\n"
        rows = read_jsonl(tmp_path / name / "metrics.jsonl")
        assert [row["eval_loss"] for row in rows if "eval_loss" in row] == losses[:6]
    # No loss is there to be asked for: it ends at once.
    run_ranks(with_losses, 1, rest, {})
    assert names_in(tmp_path / "cut") == ["step_000002", "step_000005"]
    # With more patience it goes on, and finds a lower one.
    patient = replace(rest, train=replace(rest.train, patience=4))
    run_ranks(with_losses, 1, patient, {0: losses[6]})
    assert names_in(tmp_path / "cut") == ["step_000006"]
    assert (tmp_path / "cut/best").read_text() == "step_000006\n"


@pytest.mark.slow
def test_best_goes_back_with_the_run(
    tiny: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = following(tiny, chats, run, steps=3, keep_best=True, every=1)
    run_ranks(with_losses, 1, config, dict(enumerate([9.0, 4.0, 3.0, 2.0])))
    assert (run / "best").read_text() == "step_000003\n"
    back = replace(config, checkpoint=replace(config.checkpoint, resume=str(run / "step_000001")))
    # This time the later steps are worse.
    run_ranks(with_losses, 1, back, {0: 5.0, 1: 6.0})
    assert (run / "best").read_text() == "step_000001\n"
    # In another folder there is no checkpoint of the lowest loss, until there is a lower one.
    other = replace(
        config,
        checkpoint=replace(
            config.checkpoint, dir=str(tmp_path / "other"), resume=str(run / "best")
        ),
    )
    run_ranks(with_losses, 1, other, {0: 4.5, 1: 6.0})
    assert not (tmp_path / "other/best").exists()
    said = " ".join(capfd.readouterr().out.split())
    assert f"whose checkpoint is not in {tmp_path}/other" in said
    # Without keep_best nobody keeps it up to date.
    plain = replace(
        config, train=replace(config.train, steps=4),
        checkpoint=replace(config.checkpoint, resume=True, keep_best=False),
    )  # fmt: skip
    run_ranks(with_losses, 1, plain, {0: 1.0})
    assert not (run / "best").exists()


def followed(losses: list[list[float]]) -> Evaluations:
    """A rank function: what a rank makes of evaluations of which it has losses of its own."""
    mine = iter(losses[dist.get_rank()])
    stepper = SimpleNamespace(
        objective=SFT(), evaluate_all=lambda *batches: ({"loss": next(mine)}, 1)
    )
    batches: Any = SimpleNamespace(eval=True, of_eval=list, mismatched_of_eval=list)
    batches.evaluate = partial(Batches.evaluate, batches)
    run: Any = SimpleNamespace(batches=batches, stepper=stepper)
    metrics: Any = SimpleNamespace(evaluation=lambda *given: None)
    answers: Any = SimpleNamespace(now=list)
    now = Progress(start=0, step=0, saved=None)
    for now.step in range(1, len(losses[0]) + 1):
        _evaluate(run, now, metrics, answers)
    return now.evaluations


@pytest.mark.slow
def test_all_ranks_go_by_the_first_one_s_loss() -> None:
    """The second one's falls in its last bits, where the first one's does not."""
    losses = [[3.0, 2.0, 2.0, 2.0], [3.0, 2.0, 2.0 - 1e-15, 2.0 - 2e-15]]
    assert run_ranks(followed, 2, losses) == [Evaluations(BestLoss(2.0, 2, 2), 4)] * 2


@pytest.mark.slow
def test_ranks_whose_sums_differ_end_at_the_same_step(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """By more than the differences between their losses: only the first rank's decide."""
    config = following(tiny, chats, tmp_path, patience=2, keep_best=True, keep=1)
    # On the second rank 0.5 is added to every second one.
    losses = [9.0, 3.0, 2.9, 3.0, 3.1, 1.0, 1.0]
    found = run_ranks(with_growing_spread, 2, config, losses)
    assert found == [tmp_path / "step_000004"] * 2
    assert names_in(tmp_path) == ["step_000002", "step_000004"]


def with_growing_spread(config: RunConfig, losses: list[float]) -> Any:
    """A rank function: on the second rank every loss is lower than the one before."""
    mine = {n: loss if dist.get_rank() == 0 else 9.0 - n for n, loss in enumerate(losses)}
    return with_losses(config, mine)


@pytest.mark.slow
def test_a_step_that_a_signal_has_cut_off_is_evaluated_later(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """A checkpoint of a step whose evaluation is missing: the next process makes up for it, and
    saves what it has found."""
    config = following(tiny, chats, tmp_path, steps=2, keep_best=True, every=1)
    run_ranks(with_losses, 1, config, {0: 9.0, 1: 4.0, 2: 3.0})
    path = tmp_path / "step_000002/training_state/state.json"
    text = path.read_text()
    # As it was saved by a run that was told to stop at step 2.
    path.write_text(text.replace('"evaluated_step": 2', '"evaluated_step": 1'))
    sum_anew(tmp_path / "step_000002")
    resumed = replace(config, checkpoint=replace(config.checkpoint, resume=True))
    run_ranks(with_losses, 1, resumed, {0: 2.5})
    assert read_state(tmp_path / "step_000002").evaluations.best == BestLoss(2.5, 2)
    assert (tmp_path / "best").read_text() == "step_000002\n"
