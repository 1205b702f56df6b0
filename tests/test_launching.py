"""Exit codes for each way in which torchrun ends: signals, mistakes, lost ranks. And restarted
ranks do not make a mistake again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megalora.cli import main as cli
from megalora.launching import torchrun
from megalora.user_error import guarded


def ended_by(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """The exit code when torchrun ends so."""

    def fail(_: list[str]) -> None:
        raise error

    monkeypatch.setattr(torch_run, "main", fail)
    # ``torchrun`` sets a handler of its own, which must not outlive this test.
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            guarded(torchrun, [])
    finally:
        signal.signal(signal.SIGINT, before)
    return caught.value.code


def test_a_signal_is_its_number_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        assert ended_by(monkeypatch, SignalException("got a signal", number)) == code
    # The ranks have said it.
    assert capsys.readouterr().err == ""


def test_what_ranks_have_said_is_not_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # A mistake, and a peer that was lost.
    for code in (2, 3):
        failure = ProcessFailure(1, 77, code, "<N/A>")
        assert ended_by(monkeypatch, ChildFailedError("megalora.train", {1: failure})) == code


def test_ctrl_c_before_torchrun_listens_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in (("0", "megalora: interrupted\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert ended_by(monkeypatch, KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == said


def rank(monkeypatch: pytest.MonkeyPatch, logs: Path, attempt: int, local: int, action: Any) -> Any:
    """The exit code of a rank that torchrun has given a file for its error."""
    error_file = logs / f"attempt_{attempt}" / str(local) / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setenv("RANK", str(local))
    try:
        guarded(action, [])
    except SystemExit as exit:
        return exit.code
    return 0


def mistaken(_: list[str]) -> None:
    raise ValueError("wrong")


def test_a_mistake_is_made_once_by_restarted_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Ranks other than 0 wait before they speak.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert rank(monkeypatch, tmp_path, 0, 0, mistaken) == 2
    assert capsys.readouterr().err == "megalora: wrong\n"

    def never(_: list[str]) -> None:
        pytest.fail("tried again")

    # Restarted ranks end with the code of a mistake without trying, and say nothing.
    for attempt in (1, 2):
        for local in (0, 1):
            assert rank(monkeypatch, tmp_path, attempt, local, never) == 2
    assert capsys.readouterr().err == ""
    # The mark of a mistake is in the folder of one job.
    assert rank(monkeypatch, tmp_path / "another job", 1, 0, lambda _: None) == 0


def test_a_crash_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(_: list[str]) -> None:
        raise RuntimeError("a device is gone")

    with pytest.raises(RuntimeError):
        rank(monkeypatch, tmp_path, 0, 0, crash)
    assert rank(monkeypatch, tmp_path, 1, 0, lambda _: None) == 0


@pytest.mark.parametrize("asked", [[], ["--max-restarts", "4"]])
def test_train_hands_the_number_of_restarts_on(
    asked: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("megalora.cli.rl.torchrun", started.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: {tiny}}}\ndata: {{train: a.jsonl}}\ntrain: {{steps: 1}}\n"
    )
    cli.main(["train", "c.yaml", *asked])
    # None is asked for, none is made: a restart would hide what went wrong.
    place = started[0].index("--max-restarts")
    assert started[0][place + 1] == (asked[1] if asked else "0")
    with pytest.raises(SystemExit):
        cli.main(["train", "c.yaml", "--max-restarts", "-1"])


def test_through_a_real_torchrun(tmp_path: Path) -> None:
    """Two restarts are allowed, and the mistake is still said once; about three seconds."""
    ranks = ["--standalone", "--nproc-per-node", "1", "--max-restarts", "2"]
    arguments = [*ranks, "-m", "megalora.train", "no.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "megalora.launching", *arguments], cwd=tmp_path, capture_output=True,
        text=True,
        env={**os.environ, "RANK": "0"},
    )  # fmt: skip
    said = "megalora: no.yaml: no such config file\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
