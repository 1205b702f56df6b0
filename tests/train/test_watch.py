"""Check that a lost, stopped or hanging rank ends the others, and that the line names it."""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalora.rendezvous import Met
from megalora.train.lost_peer import explained
from megalora.train.watch import pulse as pulse_module
from megalora.train.watch.judge import Beat, Judge, Verdict
from megalora.train.watch.pulse import Pulse
from megalora.train.watch.stacks import place_of
from megalora.train.watch.watch import Times, watching
from megalora.user_error import LOST_PEER
from tests.forked import fork
from tests.waiting import Clock, is_running, wait_until

HOSTS = ("node-a", "node-a", "node-b")


def beats(count: int, **changed: Beat) -> dict[int, Beat]:
    """A beat of three ranks that all work; ``rank_1=...`` replaces one."""
    made = {}
    for rank, name in enumerate(HOSTS):
        made[rank] = Beat(count, name, moves=count, step=3, phase="train", limit_s=30.0)
    for name, beat in changed.items():
        made[int(name.removeprefix("rank_"))] = beat
    return made


def judged(
    look_at: Callable[[int], dict[int, Beat]], seconds: int, *, alarmed: bool = False
) -> tuple[int, Verdict] | None:
    """The first verdict of a judge that looks every two seconds, and its second."""
    judge = Judge(silent_s=15, alarmed_s=5, blink_s=6)
    for now in range(0, seconds, 2):
        if verdict := judge.look(look_at(now), now, alarmed=alarmed):
            return now, verdict
    return None


@pytest.mark.parametrize(("alarmed", "at_s"), [(False, 28), (True, 18)])
def test_a_silent_rank_is_lost(alarmed: bool, at_s: int) -> None:
    last = Beat(10, "node-b", moves=10, step=3, phase="train", place="step.py:7 backward")

    def look(now: int) -> dict[int, Beat]:
        # It is heard for the last time at second 10, and late twice.
        return beats(now, rank_2=last) if now > 10 else beats(now)

    found = judged(look, 60, alarmed=alarmed)
    assert found is not None and found[0] == at_s
    assert found[1].lost == [2] and not found[1].hangs
    assert found[1].text == (
        f"lost rank 2 on node-b: silent for {at_s - 10} s, last seen in step 4 (train,"
        " step.py:7 backward)"
    )


def test_a_rank_that_has_left_is_not_lost() -> None:
    last = Beat(10, "node-b", moves=10, left=True)
    assert judged(lambda now: beats(now, rank_2=last), 100) is None


def test_a_held_up_thread_is_not_lost() -> None:
    """One that beats again between the two looks that are too late for it."""

    def look(now: int) -> dict[int, Beat]:
        held = 10 if 10 <= now <= 26 else now
        return beats(now, rank_2=Beat(held, "node-b", moves=held, limit_s=30))

    assert judged(look, 60) is None


def test_a_judge_that_was_stopped_itself_blames_nobody() -> None:
    judge = Judge(silent_s=15, alarmed_s=5, blink_s=6)
    same = beats(1)
    assert judge.look(same, 0, alarmed=False) is None
    assert judge.look(same, 100, alarmed=False) is None
    # From here on, the silence is the others'.
    assert judge.look(same, 102, alarmed=False) is None
    for now in range(104, 116, 2):
        assert judge.look(same, now, alarmed=False) is None
    assert judge.look(same, 116, alarmed=False) is None
    verdict = judge.look(same, 118, alarmed=False)
    assert verdict is not None and verdict.lost == [0, 1, 2]


def test_who_waits_for_nobody_holds_the_others_up() -> None:
    def look(now: int) -> dict[int, Beat]:
        found = {}
        for rank, name in enumerate(HOSTS):
            waits = rank != 1
            place = "comm.py:9 all_reduce" if waits else "rows.py:5 read"
            found[rank] = Beat(now, name, 7, 3, "train", 30.0, place, waits)
        return found

    found = judged(look, 60)
    assert found is not None and found[0] == 32
    assert found[1].hangs and found[1].lost == []
    assert found[1].text == (
        "no rank has moved for 32 s in step 4: rank 1 on node-a in train, rows.py:5 read; the"
        " others wait"
    )


def test_a_silent_rank_is_lost_rather_than_hanging() -> None:
    """Its silence ends all progress, and the limit of a step may be shorter."""

    def look(now: int) -> dict[int, Beat]:
        return {rank: Beat(now * (rank != 1), "node-a", limit_s=4) for rank in range(3)}

    found = judged(look, 60)
    assert found is not None and found[1].lost == [1]


def test_one_rank_that_moves_is_enough() -> None:
    def look(now: int) -> dict[int, Beat]:
        standing = {rank: Beat(now, "node-a", moves=1, limit_s=30) for rank in (0, 1)}
        return {**standing, 2: Beat(now, "node-b", moves=now, limit_s=30)}

    assert judged(look, 200) is None


def test_the_longest_limit_of_all_ranks_counts() -> None:
    """One rank writes a file while the others wait for it."""

    def look(now: int) -> dict[int, Beat]:
        limits = (30.0, 30.0, None)
        return {rank: Beat(now, "node-a", limit_s=limit) for rank, limit in enumerate(limits)}

    assert judged(look, 500) is None


def test_limits_of_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, pulse_module)
    pulse = Pulse(floor_s=30)
    assert pulse.limit_s is None
    pulse.at(0, "train")
    # Nobody knows how long the first step takes.
    assert pulse.limit_s is None
    clock.now_s += 2
    pulse.at(1, "train")
    assert pulse.limit_s == 30
    clock.now_s += 10
    pulse.at(2, "train")
    assert pulse.limit_s == 50
    # A rollout waits for servers, and a save for the disk, as long as they take, also the second.
    for phase in ("rollout", "save"):
        for step in (2, 3):
            pulse.at(step, phase)
            assert pulse.limit_s is None
    assert pulse.moves == 7


def test_what_is_written_is_read() -> None:
    beat = Beat(3, "node-b", 4, 5, "save", 30.5, "a.py:1 b", True, True)
    assert Beat.decode(beat.encode().encode()) == beat
    verdict = Verdict([1, 2], "lost", hangs=True)
    assert Verdict.decode(verdict.encode().encode()) == verdict


def test_a_thread_is_found_in_the_file_that_calls_the_library() -> None:
    waiting = threading.Event()

    def wait_here() -> None:
        waiting.wait()

    thread = threading.Thread(target=wait_here)
    thread.start()
    try:
        wait_until(lambda: "wait_here" in place_of(thread.ident or 0)[0])
        place, waits = place_of(thread.ident or 0)
        assert re.fullmatch(r"test_watch\.py:\d+ wait_here", place) and not waits
    finally:
        waiting.set()
        thread.join()
    assert place_of(thread.ident or 0) == ("", False)


# Processes: everything eight times as fast as in a run.
TIMES = Times(period=0.25, silent=1.8, alarmed=0.6, store=3.0)
WORLD = 3


def _rank(rank: int, port: int, run: Path, fault: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_ADDR": "node-a"}
    # A rank's process is looked up on its own node alone.
    os.environ["LOCAL_WORLD_SIZE"] = "1" if fault == "kill elsewhere" else str(WORLD)
    torch.set_num_threads(1)
    # Not pytest's, which is one for all.
    sys.stderr = (run / f"said_{rank}").open("w")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    pulse = Pulse(floor_s=1.5)
    with watching(Met(store, None), pulse, run, TIMES) as alarm, explained(run, alarm):
        for step in range(1_000_000):
            pulse.at(step, "train")
            if step == 5:
                (run / f"ready_{rank}").touch()
            if fault == "hang" and rank == 1 and step == 6:
                _hold_the_others_up()
            dist.all_reduce(torch.ones(10))
            time.sleep(0.02)


def _hold_the_others_up() -> None:
    time.sleep(600)


def _exit_code(pid: int) -> int | None:
    """Of a process that should end within seconds; None if it does not."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def _has_heard(pid: int) -> bool:
    """Whether a rank has been told of a loss by its back end, and so ignores SIGTERM, or has
    ended."""
    if not is_running(pid):
        return True
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(re.findall(r"SigIgn:\s+([0-9a-f]+)", status)[0], 16)
    return bool(ignored >> (signal.SIGTERM - 1) & 1)


def _serve(port: int) -> None:
    # As torchrun's agent does; kept by the name.
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    time.sleep(600)
    del store


FAULTS = {
    "stop": (1, signal.SIGSTOP, r"lost rank 1 on node-a: silent for \d s, last seen in step \d+"),
    "stop rank 0": (0, signal.SIGSTOP, r"lost rank 0 on node-a: silent for \d s"),
    "kill": (2, signal.SIGKILL, r"lost rank 2 on node-a: ended, last seen in step \d+ \("),
    "kill elsewhere": (2, signal.SIGKILL, r"lost rank 2 on node-a: silent for \d s"),
    "hang": (None, None, r"in step 7: rank 1 on node-a in train, test_watch.py:\d+ _hold_the_oth"),
    "stop store": (-1, signal.SIGSTOP, r"the node of rank 0 has not answered for \d s"),
    "kill store": (-1, signal.SIGKILL, r"the node of rank 0 no longer answers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_survivors_end_and_say_who_is_lost(fault: str, tmp_path: Path) -> None:
    target, number, expected = FAULTS[fault]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = fork(lambda: _serve(port))
    pids = [fork(lambda rank=rank: _rank(rank, port, tmp_path, fault)) for rank in range(WORLD)]
    survivors = [pid for rank, pid in enumerate(pids) if rank != target]
    try:
        wait_until(lambda: len(list(tmp_path.glob("ready_*"))) == WORLD)
        if target is not None:
            os.kill(server if target < 0 else pids[target], number)
        if fault.startswith("kill") and target != -1:
            # By torchrun, which sees a death as well, but here behind the back end.
            wait_until(lambda: all(_has_heard(pid) for pid in survivors))
            for pid in survivors:
                os.kill(pid, signal.SIGTERM)
        assert [_exit_code(pid) for pid in survivors] == [LOST_PEER] * len(survivors)
    finally:
        for pid in [*pids, server]:
            # Survivors have been waited for.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    said = [(tmp_path / f"said_{rank}").read_text() for rank in range(WORLD)]
    # One line for the node, by its first rank that can speak.
    speaker = 1 if target == 0 else 0
    assert re.search(expected, said[speaker]), said
    assert said[speaker].count("\n") == 1
    assert "".join(said).count("\n") == 1
    if fault == "hang":
        stacks = (tmp_path / "stuck_rank_1.txt").read_text()
        assert "_hold_the_others_up" in stacks
        assert "all_reduce" in (tmp_path / "stuck_rank_0.txt").read_text()
