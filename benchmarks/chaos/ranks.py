"""Kill, stop and hold up ranks of a training, forked from this process, and resume each time; at
the end compare every state with that of a run which nobody has disturbed."""

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from benchmarks.chaos.fault import HANG, LOST, SURVIVED, Fault
from benchmarks.chaos.scene import RANKS, Scene, step_of, steps_logged
from megalora.adapters.latest import checkpoints, read_latest
from megalora.train.__main__ import main
from megalora.user_error import LOST_PEER, guarded
from tests.forked import fork, speak_into

START_LIMIT_S = 900.0
END_LIMIT_S = 300.0
"""Until a wait counts as a hang. The watch has 35 s for a stopped rank on a machine with time to
spare; the seconds of each fault are in the record, so that a busy machine is no hang."""


class World:
    """The ranks of one attempt, in forked processes, and what torchrun's agent is for them."""

    def __init__(self, scene: Scene, run: Path) -> None:
        self.log = run.with_suffix(".log")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        # As torchrun has it: the store outlives the ranks.
        self.agent = fork(lambda: _hold_store(port))
        arguments = [str(scene.config), f"checkpoint.dir={run}"]
        self.pids = [
            fork(lambda rank=rank: _work(rank, port, arguments, self.log)) for rank in range(RANKS)
        ]
        self.codes: dict[int, int] = {}

    def ended(self) -> set[int]:
        """Ranks whose processes have ended."""
        for rank in set(range(RANKS)) - self.codes.keys():
            # Each is asked for once: afterwards its id may be another process.
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return set(self.codes)

    def wait(self, ranks: set[int], limit_s: float) -> bool:
        """Whether these ranks end in time."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.ended() >= ranks:
                return True
            time.sleep(0.02)
        return False

    def close(self) -> None:
        """End whatever still runs."""
        for rank in set(range(RANKS)) - self.ended():
            # SIGKILL ends a stopped process, too.
            os.kill(self.pids[rank], signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)
        os.kill(self.agent, signal.SIGKILL)
        os.waitpid(self.agent, 0)


@contextmanager
def world(scene: Scene, run: Path) -> Iterator[World]:
    """An attempt, all of whose processes end with the block."""
    made = World(scene, run)
    try:
        yield made
    finally:
        made.close()


def _hold_store(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    signal.pause()
    # Kept by the name until then.
    del store


def _work(rank: int, port: int, arguments: list[str], log: Path) -> None:
    """As torchrun starts a rank."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    speak_into(log)
    torch.set_num_threads(1)
    guarded(main, arguments)


def _progress(run: Path, before: set[str], ranks: World) -> list[str]:
    """Records of new steps, once there is one; none if that takes too long."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and not ranks.ended():
        # Records hold rates and times, so that a repeated step is another one.
        if new := [line for line in steps_logged(run) if line not in before]:
            return new
        time.sleep(0.02)
    return []


def _saves(run: Path, ranks: World) -> bool:
    """Whether the run has a checkpoint, now or soon."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and not ranks.ended():
        if read_latest(run) is not None:
            return True
        time.sleep(0.02)
    return False


def disturbed(scene: Scene, faults: list[str], seed: int) -> Iterator[Fault]:
    """One fault after the other (``kill``, ``stop``, ``hold`` and ``end``) in one run that is
    resumed each time. States are compared with those of an undisturbed run at the end."""
    chance = random.Random(seed)
    run = scene.run("disturbed")
    found: list[tuple[Fault, Path | None]] = []
    for number, fault in enumerate(faults):
        with world(scene, run) as ranks:
            before = set(steps_logged(run))
            # The first save of a run must have been: before it there is nothing to lose.
            if not _progress(run, before, ranks) or not _saves(run, ranks):
                yield Fault(KINDS[fault], "resume", HANG, START_LIMIT_S, _tail(ranks.log))
                return
            # Every third one in the middle of a save.
            _aim(run, chance, at_save=number % 3 == 0)
            victim = chance.randrange(RANKS)
            step = step_of(steps_logged(run)[-1])
            named = read_latest(run)
            assert named is not None
            saved = step_of_name(named.name)
            result, seconds, detail = FAULTS[fault](ranks, victim, run)
        what = f"rank {victim} behind step {step}"
        kept, told = _keep(run, scene.run("kept"), number)
        if kept is None or step_of_name(told) < saved:
            result = LOST
            detail = f"{told}, though step {saved} had been saved; {detail}"
        found.append((Fault(KINDS[fault], what, result, seconds, detail), kept))
    # Once, for all of them: it takes as long as they did together.
    right = _undisturbed(scene, max(step_of_name(kept.name) for _, kept in found if kept))
    # What a killed save has begun is cleared away by the next start.
    left = tuple(path.name for path in run.glob(".step*"))
    for fault, kept in found:
        if kept is not None and not same(kept, right / kept.name.partition("_of_")[0]):
            fault = replace(fault, result=LOST, detail=f"{kept.name} differs")
        yield replace(fault, left_over=left)


def _aim(run: Path, chance: random.Random, *, at_save: bool) -> None:
    """Wait for a moment by chance, or for one at which a checkpoint is being written."""
    time.sleep(chance.uniform(0, 1.5))
    deadline = time.monotonic() + 5
    while at_save and time.monotonic() < deadline and not list(run.glob(".step_*.tmp")):
        time.sleep(0.001)


def _kill(ranks: World, victim: int, run: Path) -> tuple[str, float, str]:
    os.kill(ranks.pids[victim], signal.SIGKILL)
    return _survivors_end(ranks, victim)


def _stop(ranks: World, victim: int, run: Path) -> tuple[str, float, str]:
    os.kill(ranks.pids[victim], signal.SIGSTOP)
    return _survivors_end(ranks, victim)


def _survivors_end(ranks: World, victim: int) -> tuple[str, float, str]:
    """All others end with the code of a lost rank, and one line names it."""
    at = time.monotonic()
    others = set(range(RANKS)) - {victim}
    if not ranks.wait(others, END_LIMIT_S):
        return HANG, END_LIMIT_S, _tail(ranks.log)
    seconds = time.monotonic() - at
    codes = {ranks.codes[rank] for rank in others}
    said = _tail(ranks.log)
    if codes != {LOST_PEER} or f"lost rank {victim} on" not in said:
        return LOST, seconds, f"codes {codes}: {said}"
    return SURVIVED, seconds, "the others end with code 3 and name the rank"


def _hold(ranks: World, victim: int, run: Path) -> tuple[str, float, str]:
    """Stopped for 6 s, as a virtual machine that moves: the run goes on."""
    at = time.monotonic()
    os.kill(ranks.pids[victim], signal.SIGSTOP)
    # Less than the watch takes to call a rank lost.
    time.sleep(6)
    before = set(steps_logged(run))
    os.kill(ranks.pids[victim], signal.SIGCONT)
    went_on = len(_progress(run, before, ranks)) > 0
    seconds = time.monotonic() - at
    return (SURVIVED if went_on else LOST), seconds, "goes on" if went_on else _tail(ranks.log)


def _end(ranks: World, victim: int, run: Path) -> tuple[str, float, str]:
    """SIGTERM to one rank: all save and end in order."""
    at = time.monotonic()
    os.kill(ranks.pids[victim], signal.SIGTERM)
    if not ranks.wait(set(range(RANKS)), END_LIMIT_S):
        return HANG, END_LIMIT_S, _tail(ranks.log)
    codes = set(ranks.codes.values())
    return (SURVIVED if codes == {0} else LOST), time.monotonic() - at, f"codes {codes}"


FAULTS = {"kill": _kill, "stop": _stop, "hold": _hold, "end": _end}
KINDS = {
    "kill": "SIGKILL of a rank",
    "stop": "SIGSTOP of a rank",
    "hold": "SIGSTOP for 6 s, then SIGCONT",
    "end": "SIGTERM to a rank",
}


def step_of_name(name: str) -> int:
    """Step of ``step_000012`` and of ``step_000012_of_3``."""
    return int(name.split("_")[1])


def _keep(run: Path, kept: Path, number: int) -> tuple[Path | None, str]:
    """Copy the checkpoint that latest names; also its name, or what is wrong."""
    try:
        latest = read_latest(run)
    except ValueError as error:
        return None, f"step_-1 {error}"
    if latest is None:
        return None, "step_-1 nothing saved"
    target = kept / f"{latest.name}_of_{number}"
    shutil.copytree(latest, target)
    return target, latest.name


def _undisturbed(scene: Scene, last: int) -> Path:
    """Checkpoints of all steps up to ``last`` by a run that nobody disturbs."""
    run = scene.run("undisturbed")
    quiet = replace_keep(scene)
    with world(quiet, run) as ranks:
        while not (run / f"step_{last:06d}").exists() and not ranks.ended():
            time.sleep(0.1)
        # One is enough: ranks agree on the step at which they stop.
        os.kill(ranks.pids[0], signal.SIGTERM)
        ranks.wait(set(range(RANKS)), END_LIMIT_S)
    assert checkpoints(run), ranks.log.read_text()[-2000:]
    return run


def replace_keep(scene: Scene) -> Scene:
    """The scene with a config that keeps all checkpoints."""
    text = scene.config.read_text().replace("keep: 3", "keep: 0")
    folder = scene.folder / "quiet"
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(text)
    return Scene(folder)


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors, bit for bit; their order in a file may differ,
    as that of generators does once their states have been restored."""
    for path in one.rglob("*.safetensors"):
        mine = load_file(path)
        theirs = load_file(other / path.relative_to(one))
        if mine.keys() != theirs.keys():
            return False
        for name, tensor in mine.items():
            # As bytes: NaN would differ from itself.
            if tensor.numpy().tobytes() != theirs[name].numpy().tobytes():
                return False
    return True


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-4:])
