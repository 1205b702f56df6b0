"""Do with runs what users did and met trouble: Ctrl-C, two runs in one folder, ``~`` and a warm-up
longer than the run."""

import gc
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import RunConfig
from tests.command_outcome import outcome
from tests.distributed.ranks import run_ranks
from tests.distributed.test_guards import said_by
from tests.parity.runs import make_config, records
from tests.waiting import PATIENCE_S, wait_until

# A program that answers a signal as our ranks do, without the ten seconds that they take to start.
RANK = f"""
import signal, sys, time
def stop(number, frame):
    # In one write: print may send the line's end apart, behind what the other rank says.
    sys.stdout.write("stopped by a signal at step 3; the adapter is run/step_000003\\n")
    sys.stdout.flush()
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
sys.stdout.write("step 3\\n")
sys.stdout.flush()
time.sleep({PATIENCE_S})
"""


# Exit codes as shells give them: 128 and the signal's number.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_torchrun_without_a_traceback(number: int, code: int, tmp_path: Path) -> None:
    """Two ranks that do as ours do when they are told to stop, under a real torchrun."""
    (tmp_path / "rank.py").write_text(RANK)
    arguments = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "rank.py"]
    with subprocess.Popen(
        [sys.executable, "-m", "megalora.launching", *arguments], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        # Both ranks have set their handlers: a signal before that would just kill them.
        assert [process.stdout.readline() for _ in range(2)] == ["step 3\n"] * 2
        process.send_signal(number)
        said, errors = process.communicate(timeout=PATIENCE_S)
    assert said == "stopped by a signal at step 3; the adapter is run/step_000003\n" * 2
    # No traceback of torchrun's, and no restart, though three were allowed.
    assert (errors, process.returncode) == ("", code)


@pytest.mark.slow
def test_ctrl_c_as_a_user_types_it(tiny: Path, chats: Path, tmp_path: Path) -> None:
    # Far more steps than anybody waits for: only the signal ends it.
    sections = {
        "model": {"path": str(tiny), "dtype": "float32"},
        "data": {"train": str(chats), "max_length": 128},
        "train": {"steps": 500, "global_batch_size": 4, "lr": 1e-3, "check_base": "off"},
        "checkpoint": {"dir": "run", "every": 1},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(sections))
    with subprocess.Popen(
        [sys.executable, "-m", "megalora", "train", "config.yaml"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        wait_until((tmp_path / "run/step_000003").exists)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=PATIENCE_S)
    # The last step is saved before the end, and said once.
    (last,) = re.findall(r"stopped by a signal at step \d+; the adapter is run/(step_\d+)\n", said)
    assert (tmp_path / "run/latest").read_text() == f"{last}\n"
    assert (errors, process.returncode) == ("", 130)


def _train_into(config: RunConfig, answer: Path) -> None:
    """A run in a process of its own, whose last words are left in a file."""
    (said,) = run_ranks(said_by, 1, config)
    answer.write_text(said)


@pytest.mark.slow
def test_two_runs_in_one_folder(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """The second is refused at its start and has changed nothing; the first goes on to its end."""
    config = make_config(tiny, chats, tmp_path / "run", {}, steps=12, eval=2)
    config = replace(config, checkpoint=replace(config.checkpoint, every=1))
    # Gloo's threads do not survive a fork: no group of this process may be left over.
    gc.collect()
    first = multiprocessing.get_context("fork").Process(
        target=_train_into, args=(config, tmp_path / "first")
    )
    first.start()
    wait_until((tmp_path / "run/step_000001").exists)
    # Neither a fresh start nor going on from a checkpoint is possible while somebody writes.
    for resume in (False, True):
        second = replace(config, checkpoint=replace(config.checkpoint, resume=resume))
        (said,) = run_ranks(said_by, 1, second)
        assert first.is_alive(), "the second came too late to tell"
        who = (
            r"ValueError: another run is writing to .*/run; it is process \d+ on"
            rf" {re.escape(socket.gethostname())} since"
        )
        assert re.match(who, said), said
    first.join(PATIENCE_S)
    assert "finished at step 12" in (tmp_path / "first").read_text()
    assert len(records(tmp_path / "run", "loss")) == 12
    # Each step once; the pattern would also find what an interrupted save left behind.
    found = sorted(path.name for path in (tmp_path / "run").glob("*step_*"))
    assert found == [f"step_{n:06d}" for n in range(1, 13)]


@pytest.fixture
def home(tiny: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The case's config, base and data in the home folder; another folder is the current one."""
    home = tmp_path / "home"
    (home / "here").mkdir(parents=True)
    (home / "base").symlink_to(tiny)
    (home / "data.jsonl").symlink_to(chats)
    (home / "config.yaml").write_text(
        "model: {path: ~/base}\ndata: {train: ~/data.jsonl, max_length: 64}\ntrain: {steps: 10,"
        " warmup: 50}\ncheckpoint: {dir: ~/runs/a}\n"
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "here")
    return home


def test_a_tilde_and_a_warmup(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Checks come before ranks start; what would be started is noted.
    started: list[list[str]] = []
    monkeypatch.setattr("megalora.cli.rl.torchrun", started.append)
    code, _, said = outcome(capsys, "train", "~/config.yaml")
    assert code == 2 and not started
    # 10 of 50 steps.
    assert (
        said
        == "megalora: train.warmup=50 is longer than train.steps=10: the learning rate would end at"
        " 20% of train.lr. Lower train.warmup or train more steps.\n"
    )
    assert outcome(capsys, "train", "~/config.yaml", "train.warmup=5")[0] == 0
    assert len(started) == 1
    # No shell expands ~ inside a YAML file or behind "=".
    for override, message in (
        ("data.train=~/none.jsonl", f"{home}/none.jsonl: no such file"),
        ("model.path=~/none", f"model.path={home}/none: no such folder"),
        ("checkpoint.dir=~/data.jsonl", f"checkpoint.dir={home}/data.jsonl is a file"),
        ("checkpoint.resume=~/runs/b", f"checkpoint.resume={home}/runs/b is not a checkpoint"),
    ):
        code, _, said = outcome(capsys, "train", "~/config.yaml", "train.warmup=5", override)
        assert code == 2 and message in said
    assert len(started) == 1
    assert os.listdir(home / "here") == [], "no folder named ~"


def _train_epochs(config: RunConfig) -> list[str]:
    """What runs of one epoch and of a hundredth say; then one with a warm-up that ends too late."""
    said = []
    for name, options in (
        ("a", {"epochs": 1.0}),
        ("b", {"epochs": 0.01}),
        ("c", {"epochs": 1.0, "warmup": 2}),
    ):
        run = replace(config.checkpoint, dir=f"{config.checkpoint.dir}/{name}")
        options = replace(config.train, steps=None, **options)
        said.append(said_by(replace(config, train=options, checkpoint=run)))
    return said


@pytest.mark.slow
def test_what_an_epoch_leaves_out_is_said(tiny: Path, chats: Path, tmp_path: Path) -> None:
    # Of the 96 chats, 76 are held out.
    config = make_config(tiny, chats, tmp_path, {}, eval=76, global_batch_size=16)
    ((one, little, warmup),) = run_ranks(_train_epochs, 1, config)
    assert (
        "train.epochs=1 of 20 samples is 1.25 steps of 16: a run of 1 trains on 16 samples, 4 are"
        " left out" in one
    )
    assert (
        "train.epochs=0.01 of 20 samples is 0.01 steps of 16: a run of 1 trains on 16 samples, 16"
        " more than" in little
    )
    assert warmup.startswith(
        "ValueError: train.warmup=2 is longer than the 1 step of train.epochs=1: "
    )
    assert len(records(tmp_path / "a", "loss")) == 1
