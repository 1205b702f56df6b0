"""A preference whose reference is the adapter that the run began with: an imported one, also after
the run was stopped and resumed at another layout."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalora.adapters.files import START_KEY
from megalora.adapters.resumable import import_adapter
from megalora.config import CheckpointConfig, ObjectiveConfig, RunConfig
from megalora.evaluate.judge import judge
from megalora.evaluate.request import Request, plan_of
from megalora.evaluate.verdict import Verdict
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import memory_of
from megalora.planner.workload import Workload
from megalora.train.checkpoint.start import start_of
from megalora.train.checkpoint.where import read_whole
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.paired import pairs_of
from tests.parity.built import built
from tests.parity.runs import make_config, records
from tests.whole_state import INDEX, sum_anew, tensors_of, whole_state

OF_START = ObjectiveConfig(name="dpo", beta=0.3, reference="start")
OF_BASE = replace(OF_START, reference="base")


@pytest.fixture(scope="module")
def imported(tiny: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained elsewhere, as a checkpoint to begin with."""
    folder = tmp_path_factory.mktemp("start")
    run_ranks(train, 1, make_config(tiny, chats, folder / "sft", {}, steps=2, lr=2e-2))
    import_adapter(folder / "sft" / "step_000002", folder / "imported", str(tiny))
    return folder / "imported"


def continued(
    base: Path, chats: Path, out: Path, resume: Path | bool, objective: ObjectiveConfig = OF_START,
    **options,
) -> RunConfig:  # fmt: skip
    config = make_config(
        base, pairs_of(chats), out, options.pop("parallel", {}), objective=objective,
        **{"eval": 9, "steps": 1, "lr": 5e-4, **options},
    )  # fmt: skip
    resumed = resume if resume is True else str(resume)
    return replace(config, checkpoint=CheckpointConfig(dir=str(out), resume=resumed))


@pytest.mark.slow
def test_an_imported_adapter_is_the_reference(
    tiny: Path, chats: Path, tmp_path: Path, imported: Path
) -> None:
    """Nothing has been gained on it before the first step."""
    run_ranks(train, 2, continued(tiny, chats, tmp_path / "start", imported, parallel={"ep": 2}))
    assert records(tmp_path / "start", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert records(tmp_path / "start", "margin")[0] == pytest.approx(0, abs=1e-5)
    assert records(tmp_path / "start", "eval_margin")[-1] > 1e-2
    # What was imported, and not what the step has made of it.
    checkpoint = tmp_path / "start" / "step_000001"
    began = tensors_of(checkpoint, START_KEY)
    masters = whole_state(imported)
    moved = whole_state(checkpoint)
    assert {f"param.{name}" for name in began} == {n for n in masters if n.startswith("param.")}
    for name, value in began.items():
        assert torch.equal(value, masters[f"param.{name}"]), name
    assert any(not torch.equal(v, moved[f"param.{n}"]) for n, v in began.items())


@pytest.mark.slow
def test_the_base_is_another_reference(
    tiny: Path, chats: Path, tmp_path: Path, imported: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(train, 1, continued(tiny, chats, tmp_path / "base", imported, OF_BASE))
    assert abs(records(tmp_path / "base", "loss")[0] - math.log(2)) > 1e-3
    assert not tensors_of(tmp_path / "base/step_000001", START_KEY)
    assert "objective.reference=start compares with that" in capfd.readouterr().out
    fresh = make_config(
        tiny, pairs_of(chats), tmp_path / "fresh", {}, objective=OF_START, eval=9, steps=1
    )
    run_ranks(train, 1, fresh)
    assert "a fresh adapter is the base" in capfd.readouterr().out
    assert records(tmp_path / "fresh", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_start(
    tiny: Path, chats: Path, tmp_path: Path, imported: Path
) -> None:
    """Stopped after two of four steps and resumed on other ranks: the losses and the margins of the
    run that went through."""
    run_ranks(train, 1, continued(tiny, chats, tmp_path / "through", imported, steps=4))
    run_ranks(train, 1, continued(tiny, chats, tmp_path / "half", imported, steps=2))
    on = continued(
        tiny, chats, tmp_path / "half", True, steps=4, parallel={"tp": 2, "ep": 2, "pp": 2}
    )
    run_ranks(train, 4, on)
    for key in ("loss", "margin", "chosen_reward"):
        expected = records(tmp_path / "through", key)
        assert records(tmp_path / "half", key) == pytest.approx(expected, rel=1e-4, abs=1e-5), key
    # Had it begun where it was resumed, nothing would have been gained.
    assert records(tmp_path / "half", "margin")[2] > 1e-2
    # What an evaluation says afterwards, with the start out of the checkpoint, too.
    (verdict,) = run_ranks(judged, 1, Request(target=str(tmp_path / "half")))
    assert verdict.judged["adapter"].others["margin"] == pytest.approx(
        records(tmp_path / "half", "eval_margin")[-1], rel=1e-4
    )
    # Refused where there is none, and in the middle of a run.
    index = tmp_path / "half/step_000004" / INDEX
    index.write_text(index.read_text().replace(f',"{START_KEY}"', ""))
    sum_anew(tmp_path / "half/step_000004")
    with pytest.raises(ValueError, match=r"index.json has no start"):
        plan_of(Request(target=str(tmp_path / "half")))
    with pytest.raises(ValueError, match=r"not a whole checkpoint: .*index.json has no start"):
        read_whole(tmp_path / "half" / "step_000004", "it")
    other = continued(tiny, chats, tmp_path / "through", True, OF_BASE, steps=5)
    with pytest.raises(Exception, match="objective.reference=start, this run has base"):
        run_ranks(train, 1, other)


def judged(request: Request) -> Verdict:
    """A rank function."""
    return judge(plan_of(request))


def held_bytes(config: RunConfig) -> int:
    """Bytes of a rank's copy of the start; a rank function."""
    with built(config) as run:
        start = start_of(None, run.model)
        assert all(value.data_ptr() != p.data_ptr() for p, value in start.items())
        return sum(value.nbytes for value in start.values())


def test_the_copy_is_planned(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """To the byte; a run that compares with the base has none."""
    config = continued(tiny, chats, tmp_path, True, parallel={"tp": 2, "ep": 2})
    shape = model_shape(read_hf_config(tiny))
    layout = ParallelLayout(parallel=config.parallel, num_ranks=2)
    plan = memory_of(shape, config.lora, layout, Workload.of(config))
    of_base = replace(config, objective=OF_BASE)
    without = memory_of(shape, config.lora, layout, Workload.of(of_base))
    assert run_ranks(held_bytes, 2, config) == [plan["adapter at the start"]] * 2
    assert plan.peak_bytes == without.peak_bytes + plan["adapter at the start"]
    assert "adapter at the start" not in without.table()
