"""Kill ranks of a job that torchrun starts again (``--max-restarts``): seconds until the first new
step, and whether each attempt goes on from the last checkpoint."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.chaos.fault import HANG, LOST, SURVIVED, Fault
from benchmarks.chaos.scene import RANKS, Scene, step_of, steps_logged
from megalora.process_table import ENDED, stat_fields

KIND = "rank killed under {command}"
LIMIT_S = 900.0
"""That an attempt may take to its first step, until it counts as a hang; a busy machine's imports
take a minute."""
COMMANDS = ("torchrun", "megalora train")


def command_line(command: str, scene: Scene, run: Path, restarts: int, *more: str) -> list[str]:
    """What a user types."""
    # The one beside this Python, whatever is on PATH.
    bin_folder = Path(sys.executable).parent
    overrides = [str(scene.config), f"checkpoint.dir={run}", *more]
    if command == "torchrun":
        arguments = ["--standalone", "--nproc-per-node", str(RANKS)]
        arguments += ["--max-restarts", str(restarts), "-m", "megalora.train", *overrides]
        return [str(bin_folder / "torchrun"), *arguments]
    arguments = ["train", *overrides, "--nproc", str(RANKS), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "megalora", *arguments]


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process id of the ranks that a launcher has started and that live."""
    found: dict[int, int] = {}
    for child in children(launcher):
        environment = Path(f"/proc/{child}/environ")
        try:
            variables = environment.read_bytes().split(b"\0")
        except OSError:
            # It has ended meanwhile.
            continue
        for variable in variables:
            name, _, value = variable.partition(b"=")
            if name == b"RANK":
                found[int(value)] = child
    return found


def children(parent: int) -> list[int]:
    """Processes that another one has started and that live."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        fields = stat_fields(pid)
        # State and parent; a zombie has ended, and some are gone meanwhile.
        if fields and int(fields[1]) == parent and fields[0] not in ENDED:
            found.append(pid)
    return found


@contextmanager
def launched(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher in a process group of its own, all of which ends with the block."""
    with log.open("wb") as said:
        process = subprocess.Popen(
            arguments, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            # The launcher first: it would start killed ranks again.
            for pid in [process.pid, *children(process.pid)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()


def kill_again_and_again(command: str, scene: Scene, times: int, seed: int) -> Iterator[Fault]:
    """One job in which so many ranks are killed, one after the other."""
    chance = random.Random(seed)
    kind = KIND.format(command=command)
    run = scene.run(f"run_{command.replace(' ', '_')}")
    log = run.with_suffix(".log")
    with launched(command_line(command, scene, run, times), log) as launcher:
        for _ in range(times):
            # Two steps: behind the first one a checkpoint is on its way.
            before = wait_for_steps(run, set(), 2, launcher)
            if before is None:
                yield Fault(kind, "start", HANG, LIMIT_S, tail(log))
                return
            time.sleep(chance.uniform(0, 2))
            ranks = ranks_of(launcher.pid)
            # In the order of ranks, so that the same seed takes the same one.
            victim = chance.choice(sorted(ranks))
            before = set(steps_logged(run))
            last = max(map(step_of, before))
            killed = time.monotonic()
            os.kill(ranks[victim], signal.SIGKILL)
            new = wait_for_steps(run, before, 1, launcher, ranks)
            seconds = time.monotonic() - killed
            what = f"SIGKILL of rank {victim} behind step {last}"
            if new is None:
                result = HANG if launcher.poll() is None else LOST
                yield Fault(kind, what, result, seconds, tail(log))
                return
            first = step_of(new[0])
            # Steps behind the last checkpoint are trained again.
            repeated = last + 1 - first
            # One may be in training, one in the thread that saves, one waiting for it.
            result = SURVIVED if 0 <= repeated <= 3 else LOST
            yield Fault(kind, what, result, seconds, f"{repeated} steps repeated")


def wait_for_steps(
    run: Path,
    before: set[str],
    number: int,
    launcher: subprocess.Popen[bytes],
    old_ranks: dict[int, int] | None = None,
) -> list[str] | None:
    """Records that were not there before, once there are so many; None if they do not come.

    Args:
        old_ranks: processes of the last attempt, whose steps do not count.
    """
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and launcher.poll() is None:
        there = steps_logged(run)
        if old_ranks and set(ranks_of(launcher.pid).values()) & set(old_ranks.values()):
            # What the survivors still write is not a step of the next attempt.
            before |= set(there)
        elif len(new := [line for line in there if line not in before]) >= number:
            return new
        time.sleep(0.02)
    return None


def tail(log: Path) -> str:
    """The last lines of a log, for a result."""
    return " | ".join(log.read_text(errors="replace").splitlines()[-6:])
