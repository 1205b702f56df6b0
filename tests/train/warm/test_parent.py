"""Ranks that are forked, killed and started again: how a launcher ends, and that a training which
was killed twice is the one that nobody has disturbed."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from megalora.serve.server import free_port
from megalora.train.saver import Progress, Saver
from megalora.train.warm.memory import SnapshotMemory
from megalora.train.warm.processes import check_may_fork
from megalora.train.warm.restore import InMemory
from tests.train.warm.scenes import (
    exit_code_of,
    launcher,
    node,
    put,
    training,
    wait_for_words,
    working,
)

RANKS = 2
STEPS = 6


def attempts(folder: Path) -> list[str]:
    """What each rank has left behind, by attempt."""
    return sorted(path.name for path in folder.iterdir() if path.name != "log")


def test_ranks_start_again_when_one_is_killed(tmp_path: Path) -> None:
    """And one that waits for it without end is ended; snapshots of a step that all have stay."""

    def then(rank: int, attempt: int, given: InMemory) -> None:
        if attempt == 0:
            # Rank 1 is a step ahead.
            for step in (3, 4, 5)[: 2 + rank]:
                state = {"rank": rank, "step": step, "state": {}, "tensors": {}}
                put(given.memory, rank, step, b"x", json.dumps(state).encode())
            if rank == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            # Rank 0 has put its own by now.
            while given.memory.steps(0) != {3, 4}:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        found = given.newest.name if given.newest else "nothing"
        steps = [sorted(given.memory.steps(other)) for other in range(RANKS)]
        (tmp_path / f"{rank}.found").write_text(f"{found} {steps}")

    pid = launcher(working(tmp_path, then), RANKS, 1, tmp_path / "log")
    assert exit_code_of(pid) == 0, (tmp_path / "log").read_text()
    assert attempts(tmp_path) == ["0.0", "0.1", "0.found", "1.0", "1.1", "1.found"]
    for rank in range(RANKS):
        assert (tmp_path / f"{rank}.found").read_text() == "step_000004 [[4], [4]]"
    said = (tmp_path / "log").read_text()
    assert "rank 1 was ended by SIGKILL; starting all ranks again (1 of 1) from step 4" in said


@pytest.mark.parametrize(("code", "times"), [(1, 3), (2, 1), (3, 3)])
def test_a_mistake_is_made_once_and_all_else_again(code: int, times: int, tmp_path: Path) -> None:
    def then(rank: int, attempt: int, given: InMemory) -> None:
        raise SystemExit(code)

    pid = launcher(working(tmp_path, then), 1, 2, tmp_path / "log")
    assert exit_code_of(pid) == code
    assert attempts(tmp_path) == [f"0.{attempt}" for attempt in range(times)]


def test_a_signal_is_passed_on_and_ends_the_job(tmp_path: Path) -> None:
    def then(rank: int, attempt: int, given: InMemory) -> None:
        signal.signal(signal.SIGTERM, lambda *_: (tmp_path / f"{rank}.told").touch() or os._exit(0))
        (tmp_path / f"{rank}.ready").touch()
        time.sleep(600)

    pid = launcher(working(tmp_path, then), RANKS, 3, tmp_path / "log")
    while len(list(tmp_path.glob("*.ready"))) < RANKS:
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert exit_code_of(pid) == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob("*.told"))) == RANKS
    assert attempts(tmp_path) == ["0.0", "0.ready", "0.told", "1.0", "1.ready", "1.told"]


def test_a_process_with_threads_is_not_forked() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(ValueError, match="ranks cannot be forked: the launcher has"):
            check_may_fork()
    finally:
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, tiny: Path, chats: Path) -> list[str]:
    config = {
        "model": {"path": str(tiny), "dtype": "float32"},
        "parallel": {"ep": RANKS},
        # Dropout, so that generators must go on, too.
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": str(chats), "max_length": 128},
        "train": {
            "steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-2,
            "ema_decay": 0.5, "check_base": "off",
        },
        "checkpoint": {"snapshots": {"every": 1}},
        "log": {"tensorboard": False, "progress": False},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("warm") / "run.yaml"
    path.write_text(json.dumps(config))
    return [str(path)]


def result_of(run: Path) -> tuple[list[Any], dict[str, Any]]:
    """Losses and gradient norms by step, and all tensors of the last checkpoint."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [(record["step"], record["loss"], record["grad_norm"]) for record in records]
    tensors: dict[str, Any] = {}
    last = run / f"step_{STEPS:06d}"
    for path in last.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            tensors[f"{path.relative_to(last)} {name}"] = tensor
    return values, tensors


type Result = tuple[list[Any], dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """``result_of`` a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    work = training([*arguments, f"checkpoint.dir={folder / 'run'}"])
    assert exit_code_of(launcher(work, RANKS, 0, folder / "log")) == 0, (folder / "log").read_text()
    return result_of(folder / "run")


def check_same(run: Path, undisturbed: Result) -> None:
    """Bit for bit, masters, moments, average and generators too."""
    values, tensors = result_of(run)
    expected, expected_tensors = undisturbed
    assert [step for step, _, _ in values] == list(range(1, STEPS + 1))
    assert values == expected
    assert tensors.keys() == expected_tensors.keys() and len(tensors) > 100
    for name, tensor in tensors.items():
        assert tensor.numpy().tobytes() == expected_tensors[name].numpy().tobytes(), name


@pytest.mark.slow
def test_a_training_that_is_killed_is_the_same(
    arguments: list[str], undisturbed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_note = Saver.take_note
    hold = Saver.hold
    write = SnapshotMemory.write

    def stop_at_once(saver: Saver, now: Progress) -> None:
        # In the third attempt, before its first step.
        if dist.get_rank() == 0 and now.step == now.start == 4 and not (run / "latest").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        take_note(saver, now)

    def kill_before(saver: Saver, now: Progress) -> None:
        # Rank 0 has step 3 in memory perhaps, and this one has not.
        if dist.get_rank() == 1 and now.step == 3 and now.start == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        hold(saver, now)

    def kill_within(memory: SnapshotMemory, rank: int, step: int, *given: Any) -> None:
        def half(file: Any) -> tuple[int, str]:
            file.write(b"half of a header")
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("has been killed")

        # Step 3 was in memory before the first kill on this rank, and is again.
        is_first = not (tmp_path / "killed within").exists()
        if rank == 0 and step == 5 and is_first:
            (tmp_path / "killed within").touch()
            write(memory, rank, step, half, *given[1:])
        write(memory, rank, step, *given)

    run = tmp_path / "run"
    monkeypatch.setattr(Saver, "take_note", stop_at_once)
    monkeypatch.setattr(Saver, "hold", kill_before)
    monkeypatch.setattr(SnapshotMemory, "write", kill_within)
    started = [*arguments, f"checkpoint.dir={run}"]
    pid = launcher(training(started), RANKS, 2, tmp_path / "said")
    assert exit_code_of(pid) == 0, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert "rank 1 was ended by SIGKILL; starting all ranks again (1 of 2) from step 2" in said
    assert "rank 0 was ended by SIGKILL; starting all ranks again (2 of 2) from step 4" in said
    for step in (2, 4):
        assert f"the ranks were started again; going on from step {step} in memory" in said
    # What was in memory alone is on disk now, and nothing else.
    (only,) = run.glob("step_*")
    assert only.name == "step_000004"

    pid = launcher(training([*started, "checkpoint.resume=true"]), RANKS, 0, tmp_path / "said")
    assert exit_code_of(pid) == 0, (tmp_path / "said").read_text()
    check_same(run, undisturbed)


@pytest.mark.slow
def test_a_training_whose_node_is_killed_is_the_same(
    arguments: list[str], undisturbed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of one rank each, and a spare; EP 2 between the nodes."""
    hold_step = Saver.hold

    def kill_before(saver: Saver, now: Progress) -> None:
        rank = dist.get_rank()
        # Rank 1's node is lost when the neighbour has its step 2, and step 3 is trained.
        if rank == 1 and now.step == 3 and now.start == 0:
            assert saver.snapshots is not None and saver.snapshots.rounds is not None
            while saver.snapshots.rounds.outbox.taken(1) != 3:
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        # Then a rank of the other node.
        if rank == 0 and now.step == 5 and now.start == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        hold_step(saver, now)

    monkeypatch.setattr(Saver, "hold", kill_before)
    run = tmp_path / "run"
    work = training(
        [*arguments, f"checkpoint.dir={run}", "checkpoint.snapshots={every: 1, replicate: 1}"]
    )
    port = free_port("127.0.0.1")
    logs = [tmp_path / f"node-{letter}" for letter in "abc"]
    pids: list[int] = []
    for log, words in zip(logs, ("this is node 0", "this is node 1", "as a spare"), strict=True):
        pids.append(node(work, port, log))
        wait_for_words(log, words)
    codes = [exit_code_of(pid) for pid in pids]
    said = "\n".join(log.read_text() for log in logs)
    assert codes == [0, -signal.SIGKILL, 0], said
    assert "node-b is lost (the other side has closed the link); starting all ranks again" in said
    for step in (2, 4):
        assert f"the ranks were started again; going on from step {step} in memory" in said
    # Nothing was on the disk before the end.
    (only,) = run.glob("step_*")
    assert only.name == f"step_{STEPS:06d}"
    check_same(run, undisturbed)
