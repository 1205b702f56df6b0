"""``megalora train``: the torchrun that it starts, mistakes before that, and what ranks say
after."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megalora.cli import main as cli
from tests.command_outcome import outcome
from tests.hub_cache import cache_model


@pytest.fixture
def run_yaml(tiny: Path, tmp_path: Path) -> Path:
    """A config without mistakes, whose data are looked for but not read before ranks start."""
    path = tmp_path / "run.yaml"
    (tmp_path / "chats.jsonl").touch()
    path.write_text(
        f"model: {{path: {tiny}}}\ndata: {{train: {tmp_path}/chats.jsonl}}\ntrain: {{steps: 3,"
        " global_batch_size: 8}\n"
    )
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What ``megalora train`` hands to torchrun instead of running it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(torch_run, "main", calls.append)
    return calls


def test_train_starts_torchrun(
    run_yaml: Path,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # torchrun warns where it sets this to 1 itself.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    arguments = ["train", run_yaml, "train.lr=0.5", "--nproc", 4, "parallel.ep=2", "train.lr=0.25"]
    assert outcome(capsys, *arguments) == (0, "", "")
    # Overrides in their order, of which the last one wins, wherever options of ours stand between.
    assert started == [
        ["--standalone", "--nproc-per-node", "4", "--max-restarts", "0", "-m", "megalora.train",
         str(run_yaml),
         "train.lr=0.5", "parallel.ep=2", "train.lr=0.25"]
    ]  # fmt: skip
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_train_keeps_the_number_of_threads_it_is_given(
    run_yaml: Path,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    outcome(capsys, "train", run_yaml)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert started[0][:3] == ["--standalone", "--nproc-per-node", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lrr=1"], "unknown config key train.lrr; did you mean train.lr?"),
        (["--nproc", "0"], "a run needs at least 1 rank, got 0"),
        (
            ["--nproc", "3", "parallel.ep=2"],
            (
                "3 ranks cannot hold the expert grid: etp=1 * ep=2 * pp=1 = 2, and 3 is not a"
                " multiple of 2.\n  Change parallel.etp or parallel.ep or parallel.pp, or launch a"
                " multiple of 2 ranks."
            ),
        ),
        (
            ["--nproc", "4", "parallel.tp=4"],
            (
                "parallel.tp=4 does not fit the model's 6 attention heads and 2 key/value heads; it"
                " can be one of 1, 2, 6"
            ),
        ),
        (
            ["lora.target_modules=[q_porj]"],
            (
                "lora.target_modules: 'q_porj' matches nothing in this model; did you mean q_proj?"
                " Adaptable: down_proj, gate, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj,"
                " v_proj"
            ),
        ),
    ],
)
def test_train_finds_mistakes_before_ranks_start(
    run_yaml: Path,
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert outcome(capsys, "train", run_yaml, *arguments) == (2, "", f"megalora: {message}\n")
    assert not started


def test_train_leaves_a_model_on_the_hub_to_the_ranks(
    run_yaml: Path,
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Known from a download before, so that the hub is not asked for it; but no folder was named, so
    # that the mistake in the second cannot be seen yet.
    cache_model(tmp_path / "hub", "Qwen/Qwen3-30B-A3B")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    overrides = ["model.path=Qwen/Qwen3-30B-A3B", "lora.target_modules=[q_porj]"]
    assert outcome(capsys, "train", run_yaml, *overrides) == (0, "", "")
    assert len(started) == 1


def failure(exitcode: int) -> ChildFailedError:
    """What torchrun raises when rank 1, process 77, ends so."""
    return ChildFailedError("megalora.train", {1: ProcessFailure(1, 77, exitcode, "<N/A>")})


def test_a_mistake_of_the_ranks_is_not_reported_twice(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rank that ends with 2 has said its mistake.
    def fail(_: list[str]) -> None:
        raise failure(exitcode=2)

    monkeypatch.setattr(torch_run, "main", fail)
    assert outcome(capsys, "train", run_yaml) == (2, "", "")


def test_a_crash_of_the_ranks_is_torchrun_s_to_report(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Killed: no rank can have said anything.
    def fail(_: list[str]) -> None:
        raise failure(exitcode=-9)

    monkeypatch.setattr(torch_run, "main", fail)
    with pytest.raises(ChildFailedError, match="Signal 9"):
        cli.main(["train", str(run_yaml)])


@pytest.mark.slow
def test_ranks_report_one_mistake_once(tmp_path: Path) -> None:
    """Through a real torchrun, which would end rank 0 as soon as rank 1 has left."""
    arguments = ["--standalone", "--nproc-per-node", "2", "-m", "megalora.train", "no.yaml"]
    start = f"from megalora.launching import torchrun; torchrun({arguments})"
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True
    )
    said = "megalora: no.yaml: no such config file\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def mistaken(_: list[str]) -> None:
    raise ValueError("wrong\n  Do this.")


def test_a_rank_that_is_mistaken_alone_speaks_after_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 speaks for all at once. Another waits half a minute, in which rank 0 would have made
    the same mistake and torchrun would have ended them all."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank, patience, said in (("0", [], "megalora: "), ("3", [30], "megalora (rank 3): ")):
        waited.clear()
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            cli.guarded(mistaken, [])
        assert (caught.value.code, waited) == (2, patience)
        assert capsys.readouterr().err == f"{said}wrong\n  Do this.\n"


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"):
        cli.guarded(mistaken, [])


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        cli.guarded(lambda _: {}["bug"], [])  # type: ignore[index]


def test_train_without_a_config_says_how_it_is_called(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megalora.train"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "megalora: usage: torchrun --nproc-per-node N -m megalora.train CONFIG.yaml"
        " [section.key=value ...]\n"
    )
