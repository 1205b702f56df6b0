"""Kill ranks of a job that goes on from snapshots in memory (``checkpoint.snapshots``).

Measured are the seconds until the first new step, the steps that are trained again, and whether the
end is that of a run which nobody has disturbed, bit for bit.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.chaos.fault import HANG, LOST, SURVIVED, Fault
from benchmarks.chaos.ranks import same
from benchmarks.chaos.restarts import (
    LIMIT_S,
    children,
    command_line,
    launched,
    tail,
    wait_for_steps,
)
from benchmarks.chaos.scene import RANKS, Scene, step_of, steps_logged
from megalora.adapters.latest import read_latest

KIND = "rank killed, started again from memory"
MOST_REPEATED = 1
"""Steps that a restart from memory may train again."""


# Nothing on disk before the end: memory alone has the steps.
IN_MEMORY = ("checkpoint.every=0", "checkpoint.snapshots={every: 1}")


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process id of the ranks that a launcher has forked and that live."""
    found: dict[int, int] = {}
    for child in children(launcher):
        try:
            name = Path(f"/proc/{child}/comm").read_text().strip()
        except OSError:
            # It has ended meanwhile.
            continue
        if name.startswith("rank "):
            found[int(name.removeprefix("rank "))] = child
    return found


def kill_again_and_again(
    scene: Scene, times: int, seed: int, victims: list[int] | None = None
) -> Iterator[Fault]:
    """One job in which so many ranks are killed, one after the other, and which then ends.

    Args:
        victims: ranks to kill in this order; by chance where there are none.
    """
    chance = random.Random(seed)
    run = scene.run("warm")
    faults: list[Fault] = []
    command = command_line("megalora train", scene, run, times, *IN_MEMORY)
    with launched(command, run.with_suffix(".log")) as launcher:
        for number in range(times):
            if wait_for_steps(run, set(), 2, launcher) is None:
                yield Fault(KIND, "start", HANG, LIMIT_S, tail(run.with_suffix(".log")))
                return
            time.sleep(chance.uniform(0, 0.5))
            victim = victims[number] if victims else chance.randrange(RANKS)
            fault = _kill(run, launcher, victim)
            faults.append(fault)
            if fault.result == HANG:
                yield from faults
                return
        os.kill(launcher.pid, signal.SIGTERM)
        launcher.wait(LIMIT_S)
    differs = _differs(scene, run)
    for fault in faults:
        yield replace(fault, result=LOST, detail=differs) if differs else fault


def _kill(run: Path, launcher: subprocess.Popen[bytes], victim: int) -> Fault:
    """Kill a rank and wait for the first step of those that are started again."""
    # All of them: what survivors still write is no step of the next attempt.
    old = ranks_of(launcher.pid)
    os.kill(old[victim], signal.SIGKILL)
    killed = time.monotonic()
    while set(ranks_of(launcher.pid).values()) & set(old.values()):
        time.sleep(0.01)
    before = set(steps_logged(run))
    last = max(map(step_of, before))
    what = f"SIGKILL of rank {victim} behind step {last}"
    new = wait_for_steps(run, before, 1, launcher)
    seconds = time.monotonic() - killed
    if new is None:
        return Fault(KIND, what, HANG, seconds, tail(run.with_suffix(".log")))
    repeated = last + 1 - step_of(new[0])
    result = SURVIVED if 0 <= repeated <= MOST_REPEATED else LOST
    return Fault(KIND, what, result, seconds, f"{repeated} steps repeated")


def _differs(scene: Scene, run: Path) -> str:
    """What differs in the end from a run of as many steps that nobody disturbs."""
    latest = read_latest(run)
    if latest is None:
        return f"nothing was saved at the end: {tail(run.with_suffix('.log'))}"
    steps = step_of(steps_logged(run)[-1])
    quiet = scene.run("quiet")
    command = command_line("megalora train", scene, quiet, 1, *IN_MEMORY, f"train.steps={steps}")
    with launched(command, quiet.with_suffix(".log")) as launcher:
        launcher.wait()
    if _values(run) != _values(quiet):
        return "losses or gradient norms differ from those of an undisturbed run"
    return "" if same(latest, quiet / latest.name) else f"{latest.name} differs"


def _values(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each record, exactly."""
    values: list[tuple[int, float, float]] = []
    for line in steps_logged(run):
        record = json.loads(line)
        values.append((record["step"], record["loss"], record["grad_norm"]))
    return values
