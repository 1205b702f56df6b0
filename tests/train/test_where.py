"""Check which checkpoint a run goes on from, with ``latest`` missing, damaged or behind, and with
state.json as a fuzzer leaves it."""

import json
import os
import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megalora.adapters.files import INDEX, STATE_JSON, WEIGHTS
from megalora.adapters.training_state import read_state
from tests.train.folders import found, save_filled
from tests.whole_state import RANK_0, whole_state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 2, 4 and 6; ``latest`` names 6."""
    (tmp_path / "run").mkdir()
    for step in (2, 4, 6):
        save_filled(tmp_path / f"run/step_{step:06d}")
    return tmp_path / "run"


def test_latest_decides(run: Path) -> None:
    assert found(run).state.step == 6
    assert found(run).notes == []
    (run / "latest").write_text("step_000004\n")
    assert found(run).state.step == 4


def test_a_checkpoint_of_another_step_than_its_name(run: Path) -> None:
    shutil.rmtree(run / "step_000006")
    shutil.copytree(run / "step_000004", run / "step_000006")
    answer = found(run)
    assert answer.state.folder.name == "step_000004"
    assert "state.json in it is that of step 4" in answer.notes[0]


# latest is a file with the name of a folder beside it; nothing else may be followed.
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "has checkpoints but no latest"),
        (b"", "holds ''"),
        (b"../outside\n", "holds '../outside', which is not the name of a checkpoint"),
        (b"/tmp/step_000001\n", "which is not the name of a checkpoint"),
        (b"step_000006/training_state\n", "which is not the name of a checkpoint"),
        (b"step_00000\xe7\n", "which is not the name of a checkpoint"),
        (b"x" * 300, "which is not the name of a checkpoint"),
        (
            b"step_000099\n",
            "names .*step_000099, which is not a checkpoint: it has no training_state",
        ),
    ],
)
def test_a_broken_latest_gives_the_newest_whole_checkpoint_and_a_line(
    run: Path, content: Any, reason: str
) -> None:
    (run / "latest").unlink()
    if content is not None:
        (run / "latest").write_bytes(content)
    # Going on is right, because all checkpoints are the run's own; saying nothing would not be.
    answer = found(run)
    assert answer.state.step == 6
    (note,) = answer.notes
    assert note.endswith("going on from step_000006, the newest whole checkpoint")
    assert re.search(reason, note)


def test_latest_may_be_a_folder(run: Path) -> None:
    (run / "latest").unlink()
    (run / "latest").mkdir()
    assert found(run).state.step == 6


def test_a_pipe_in_place_of_latest_is_not_waited_for(run: Path) -> None:
    (run / "latest").unlink()
    os.mkfifo(run / "latest")
    # A reader that opens it waits for a writer: the signal ends that.
    signal.alarm(20)
    answer = found(run)
    signal.alarm(0)
    assert answer.state.step == 6
    assert "latest is not a regular file; going on from step_000006" in answer.notes[0]


def test_newest_is_the_one_that_was_saved_last(run: Path) -> None:
    """After a roll-back to step 2, step 3 is newer than 4 and 6, which belong to what was given
    up."""
    save_filled(run / "step_000003")
    (run / "latest").unlink()
    assert found(run).state.step == 3


def test_going_back_moves_latest(run: Path) -> None:
    """So that a restart before the next save goes on from there, not from what was given up."""
    answer = found(run, resume=str(run / "step_000002"))
    assert answer.state.step == 2
    assert answer.notes == [
        "going back to step_000002: later checkpoints stay until their steps are saved again"
    ]
    assert found(run).state.step == 2
    # And forth again.
    assert found(run, resume=str(run / "step_000006")).notes == []
    assert found(run).state.step == 6


def test_a_job_s_own_restart_goes_on_whatever_resume_says(run: Path, tmp_path: Path) -> None:
    # By hand, a folder that holds checkpoints is not written over.
    with pytest.raises(ValueError, match="already holds step_000006. Set checkpoint.resume=true"):
        found(run, resume=False)
    # torchrun repeats the command as it was given, but the folder has got checkpoints since.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_filled(elsewhere / "step_000001")
    for resume in (False, str(elsewhere / "step_000001")):
        assert found(run, resume=resume, restarted=True).state.step == 6
    # A job that died before its first save begins anew.
    assert found(tmp_path / "new", resume=False, restarted=True).state is None


# As a full disk, an interrupted copy or a careless clean-up leave it.
DAMAGES = {
    "state.json gone": lambda folder: (folder / STATE_JSON).unlink(),
    "index gone": lambda folder: (folder / INDEX).unlink(),
    "a rank's file gone": lambda folder: (folder / RANK_0).unlink(),
    "a rank's file cut": lambda folder: os.truncate(folder / RANK_0, 1000),
    "weights cut": lambda folder: os.truncate(folder / WEIGHTS, 300),
    "weights empty": lambda folder: os.truncate(folder / WEIGHTS, 0),
    "state.json cut": lambda folder: os.truncate(folder / STATE_JSON, 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(run: Path, damage: str) -> None:
    DAMAGES[damage](run / "step_000006")
    answer = found(run)
    assert answer.state.step == 4
    assert "step_000006, which is not a " in answer.notes[0]
    # A checkpoint that was asked for by name is not replaced by another.
    with pytest.raises(
        ValueError, match=r"checkpoint.resume=.*step_000006 is not a (whole )?checkpoint"
    ):
        found(run, resume=str(run / "step_000006"))


def test_never_a_fresh_start_beside_checkpoints(run: Path) -> None:
    for folder in run.glob("step_*"):
        (folder / RANK_0).unlink()
    with pytest.raises(
        ValueError,
        match="none of its 3 checkpoints is whole .*step_000002 is not a whole checkpoint",
    ):
        found(run)
    # Without any checkpoint a run begins anew, unless latest says that there was one.
    empty = run.parent / "empty"
    empty.mkdir()
    assert found(empty).state is None
    (empty / "latest").write_text("step_000005\n")
    with pytest.raises(ValueError, match="remove .*latest to start anew"):
        found(empty)


# The state of a run, and that of an adapter that was imported for training to go on from.
STATE = {"step": 3, "num_samples": 7, "world_size": 2, "saved_at": 1e9, "config": {
    "model": {"path": "b"}, "data": {}, "train": {}, "lora": {}}}  # fmt: skip
IMPORT = {
    "step": 0,
    "imported_from": "there",
    "base": "b",
    "adapted": [["q_proj", 0, 4, 2.0], ["lm_head", None, 4, 2]],
}
# Each key with a value of another type or range: True is an int for Python, 2**60 is no step that
# anybody has reached, JSON as Python writes it has NaN.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "step must be a count, got None"),
    ({**STATE, "step": None}, "step must be a count, got None"),
    ({**STATE, "step": True}, "step must be a count, got True"),
    ({**STATE, "step": -1}, "step must be a count, got -1"),
    ({**STATE, "step": 2**60}, "step must be a count"),
    ({**STATE, "step": 3.0}, "step must be a count, got 3.0"),
    ({**STATE, "num_samples": "7"}, "num_samples must be a count, got '7'"),
    ({**STATE, "world_size": [2]}, r"world_size must be a count, got \[2\]"),
    ({**STATE, "config": []}, r"config must be an object of sections, got \[\]"),
    ({**STATE, "config": {}}, "config.model must be an object, got None"),
    ({**STATE, "config": {**STATE["config"], "lora": 1}}, "config.lora must be an object, got 1"),
    ({**STATE, "saved_at": "now"}, "saved_at must be a time in seconds, got 'now'"),
    ({**STATE, "saved_at": float("nan")}, "saved_at must be a time in seconds, got nan"),
    ({**STATE, "identity": 5}, "identity must be an object, got 5"),
    ({**STATE, "identity": {"train": 1}}, "identity.train must be a digest, got 1"),
    ({**STATE, "identity": {"train": "a", "config": None}},
     "identity.config must be the base's config.json, got None"),
    ({**STATE, "cycle_start": 4}, "cycle_start must be at most the step, got 4"),
    ({**STATE, "cycle_start": 2, "left_out": 2}, "left_out must be at most 1 steps, got 2"),
    ({**STATE, "left_out": -1}, "left_out must be a count, got -1"),
    ({"imported_from": "x"}, "step must be a count"),
    ({**IMPORT, "base": None}, "base must be text, got None"),
    ({**IMPORT, "adapted": {}}, r"adapted must be a list, got \{\}"),
    ({**IMPORT, "adapted": [["q_proj", 0, 4]]},
     r"adapted\[0\] must be \[module, layer, rank, scale\]"),
    ({**IMPORT, "adapted": [["q_proj", True, 4, 2.0]]}, r"adapted\[0\] must be"),
    ({**IMPORT, "adapted": [["q_proj", 0, 4, 2.0, "Z"]]}, r"adapted\[0\] must be"),
    # Ranks of experts that do not fit the rank.
    ({**IMPORT, "adapted": [["up_proj", 0, 4, 2.0, "", [3, 2]]]}, r"adapted\[0\] must be"),
    ({**IMPORT, "adapted": [["up_proj", 0, 4, 2.0, "", []]]}, r"adapted\[0\] must be"),
    ({**IMPORT, "adapted": [7]}, r"adapted\[0\] must be"),
]  # fmt: skip


def state_file(folder: Path, content: bytes) -> Path:
    (folder / STATE_JSON).parent.mkdir(parents=True)
    (folder / STATE_JSON).write_bytes(content)
    return folder


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_a_wrong_state_names_file_and_key(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"state.json is damaged: {message}"):
        read_state(state_file(tmp_path, json.dumps(content).encode()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b"null", "must be a JSON object"),
        (b"\xff\xfe", "not UTF-8|not valid JSON"),
        (b'{"step": ' * 100_000, "nested more than 100 deep|not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_what_is_not_json_is_a_line(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_state(state_file(tmp_path, content))


@pytest.mark.parametrize("key", list(STATE))
@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 1.5, True, [[]], {"a": None}])
def test_no_other_error_leaves_the_reader(key: str, value: Any, tmp_path: Path) -> None:
    """Every key with every kind of value: read, or a ValueError."""
    for whole in (STATE, IMPORT):
        content = json.dumps({**whole, key: value}).encode()
        folder = state_file(tmp_path / whole.get("base", "run"), content)
        with suppress(ValueError):
            assert type(read_state(folder).step) is int


def test_a_right_state_is_read(tmp_path: Path) -> None:
    state = read_state(state_file(tmp_path / "a", json.dumps(STATE).encode()))
    assert (state.step, state.num_samples, state.world_size, state.saved_at) == (3, 7, 2, 1e9)
    assert state.config["model"] == {"path": "b"} and state.identity is None
    imported = read_state(state_file(tmp_path / "b", json.dumps(IMPORT).encode()))
    assert (imported.step, imported.base, imported.imported_from) == (0, "b", "there")
    assert imported.adapted == IMPORT["adapted"]


def test_the_tensors_of_the_helper_are_what_it_says(run: Path) -> None:
    # A checkpoint is marked by its step, on which the tests of crashes rely.
    assert float(whole_state(run / "step_000004")["param.a"][0]) == 4
