"""Save in a thread: what training does meanwhile does not reach the file, a third save waits, and
an error ends the run or does not."""

import queue
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

from megalora.config import CheckpointConfig
from megalora.lora.slices import Slice
from megalora.train import saver as saver_module
from megalora.train.checkpoint.background import REST, Background, Pace, Save
from megalora.train.checkpoint.pieces import Block
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.saver import Progress, Saver

TIMEOUT_S = 60


def block(tensor: torch.Tensor) -> list[Block]:
    return [Block("param", tensor, (("a", Slice.whole((3,))),))]


def test_a_file_has_what_was_there_when_its_save_began(tmp_path: Path) -> None:
    """Two saves under way, and a third that must not take the memory of either."""
    said: list[str] = []
    waited = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waited.set()

    background = Background(say)
    go: queue.Queue[None] = queue.Queue()
    trained = torch.zeros(3)
    for step in (1, 2, 3):
        trained += 1
        if step == 3:
            # The first save is let go while the third waits for its memory.
            threading.Timer(0.1, go.put, (None,)).start()
        snapshot = background.snapshot(step)
        snapshot.take(block(trained), {})

        def write(snapshot: Snapshot = snapshot, path: Path = tmp_path / f"{step}") -> None:
            go.get(timeout=TIMEOUT_S)
            snapshot.write(path)

        background.begin(Save(step, write, snapshot))
    assert waited.is_set()
    assert (
        said[0].startswith("step 3: waited 0.") and "for the save of step 1: the disk is" in said[0]
    )
    trained += 1
    for _ in range(2):
        go.put(None)
    background.finish()
    assert [save.error for save in background.pending] == [None, None, None]
    for step in (1, 2, 3):
        assert load_file(tmp_path / f"{step}")["param.a"].tolist() == [step] * 3


def test_a_save_that_fails_ends_alone() -> None:
    background = Background(pytest.fail)

    def fail() -> None:
        raise ValueError("no room")

    for step, write in ((1, fail), (2, lambda: None)):
        background.begin(Save(step, write, background.snapshot(step)))
    background.finish()
    assert [str(save.error) for save in background.pending] == ["no room", "None"]


def ended(on_error: str, step: int, error: Exception | None) -> tuple[list[str], Progress]:
    """(lines, progress) of a run at ``step`` that takes note of the end of step 2's save."""
    said: list[str] = []
    saver: Any = object.__new__(Saver)
    config = SimpleNamespace(checkpoint=CheckpointConfig(on_error=on_error))  # pyright: ignore
    saver.run = SimpleNamespace(config=config)
    saver.writer = SimpleNamespace(folder=lambda step: Path(f"step_{step}"))
    saver.say = said.append
    saver.serve = lambda folder: said.append(f"served {folder}")
    saver.background = Background(pytest.fail)
    saver.snapshots = None
    save = Save(2, lambda: None, Snapshot(), error, done=True)
    saver.background.pending.append(save)
    now = Progress(0, step, Path("step_1"))
    saver.take_note(now)
    return said, now


def test_what_becomes_of_an_error() -> None:
    full = ValueError("could not save step_2 (No space left on device)")
    for on_error in ("stop", "continue"):
        said, now = ended(on_error, 3, None)
        assert (said, now.saved) == (["served step_2"], Path("step_2"))
        # The last step of a run: its adapter would be lost in silence.
        with pytest.raises(ValueError, match="No space left"):
            ended(on_error, 2, full)
    with pytest.raises(ValueError, match="No space left"):
        ended("stop", 3, full)
    said, now = ended("continue", 3, full)
    assert said == [f"{full}; training goes on"]
    assert now.saved == Path("step_1")
    # A bug, or a lost rank, is neither.
    with pytest.raises(RuntimeError, match="Connection closed"):
        ended("continue", 3, RuntimeError("Connection closed by peer"))


def test_a_failed_save_is_said_where_another_error_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    full = ValueError("could not save step_2 (No space left on device)")
    go = threading.Event()

    def fail() -> None:
        raise full

    def lose() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(saver_module, "CLOSE_S", 0.5)
    monkeypatch.setattr(saver_module, "host_group", lambda: nullcontext(None))
    monkeypatch.setattr(saver_module, "average_of", lambda *_: None)
    for name in ("OwnedPieces", "CheckpointWriter", "HeldCheck", "DriftCheck"):
        monkeypatch.setattr(saver_module, name, lambda *_: None)
    run: Any = MagicMock()
    nothing: Any = None

    def train() -> None:
        of = saver_module.saving(
            run, nothing, nothing, nothing, nothing, nothing, nothing, said.append
        )
        with of as saver:
            # The second is of a rank that is lost, which the watch says.
            for step, write in ((2, fail), (3, lose), (4, lambda: go.wait(TIMEOUT_S))):
                saver.background.begin(Save(step, write, Snapshot()))
            raise ValueError("data.jsonl:8: row 7 is damaged")

    with pytest.raises(ValueError, match="row 7"):
        train()
    go.set()
    assert said == [str(full), "step 4: its save was not finished"]


def test_automatic_saves_leave_the_loop_its_time() -> None:
    times = iter([0.0, 2.0, 2.0 * REST - 1, 2.0 * REST, 50.0, 50.0, 51.0])
    pace = Pace(lambda: next(times))
    pace.begin()
    pace.end()
    assert pace.rests
    assert not pace.rests
    # A save that took no time needs no rest.
    pace.begin()
    pace.end()
    assert not pace.rests


def test_automatic_saves_need_a_limit() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.every=auto .* set checkpoint.keep"):
        CheckpointConfig(every="auto")
    assert CheckpointConfig(every="auto", keep=2).every == "auto"
