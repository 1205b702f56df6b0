"""Kill a save, or let the disk fail under it, at every change that it makes to the file system."""

import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.children import Ended, in_child
from benchmarks.chaos.fault import HANG, LOST, REFUSED, SURVIVED, Fault
from benchmarks.chaos.held_run import HeldRun
from megalora.adapters.latest import checkpoints
from megalora.train.checkpoint.writer import point_latest_at

# Names of Python's audit events; opening a file for writing, and forcing one to disk, are two more.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}


@dataclass(frozen=True)
class Scenario:
    """A run folder, and what is saved there."""

    name: str
    before: tuple[int, ...]
    """Steps that are there."""
    step: int
    """The one that is saved."""
    latest: int | None = None
    """The step that latest names; None for the last."""
    keep: int = 0

    def begin(self, held: HeldRun, folder: Path) -> Path:
        """The folder as it is before the save, made once and copied."""
        shutil.rmtree(folder, ignore_errors=True)
        # Copying needs no process that saves.
        begun = folder.with_name(self.name.replace(" ", "_"))
        if not begun.exists():
            held.begin(begun, *self.before)
            if self.latest is not None:
                point_latest_at(begun / f"step_{self.latest:06d}")
        shutil.copytree(begun, folder)
        return folder

    @property
    def may_be(self) -> set[int | None]:
        """Steps from which a run may go on after a crash: the new one, or what it would have gone
        on from; where latest names what is replaced, also the one before that."""
        # Otherwise latest names the last one.
        named = self.latest or (self.before[-1] if self.before else None)
        earlier = [step for step in self.before if step < self.step]
        replaced = set(earlier[-1:]) if named == self.step else set()
        return {self.step, named} | replaced


SCENARIOS = (
    Scenario("first save", (), 1),
    Scenario("second save", (1,), 2),
    Scenario("save that forgets another", (1, 2), 3, keep=1),
    Scenario("step saved again, latest behind it", (1, 2), 2, latest=1),
    Scenario("step saved again, latest names it", (1, 2), 2, latest=2),
    Scenario("only step saved again", (1,), 1),
    Scenario("earlier step saved again", (1, 2, 3), 2, latest=3),
)


def before_change(number: int, fail: Callable[[], object]) -> list[str]:
    """Call ``fail`` before change ``number`` of the file system, counted from 1, for the rest of
    this process's life; returns the list to which each change is added."""
    changes: list[str] = []

    def change(what: str) -> None:
        changes.append(what)
        if len(changes) == number:
            fail()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES:
            change(f"{event[3:]} of {Path(str(arguments[0])).name}")
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax"):
            change(f"open of {Path(str(arguments[0])).name}")

    fsync = os.fsync

    def forced(descriptor: int) -> None:
        change("fsync")
        fsync(descriptor)

    # Python raises no audit event for it.
    os.fsync = forced
    # It cannot be taken off: this process is a child that ends soon.
    sys.addaudithook(hook)
    return changes


def failing_saves(
    held: HeldRun, scenario: Scenario, folder: Path, every: int,
    fail: Callable[[int], object], **options: Any,
) -> Iterator[tuple[int, Ended]]:  # fmt: skip
    """Save once for each change, or each so many-th, and call ``fail`` with its number before it;
    (number, how the save ended) of each. ``folder`` is as that save has left it.

    Args:
        options: of the section ``checkpoint``.
    """
    number = 1
    while True:
        scenario.begin(held, folder)

        def save(number: int = number) -> dict[str, Any]:
            changes = before_change(number, lambda: fail(number))
            held.save(folder, scenario.step, **options)
            return {"ended": len(changes) < number}

        ended = in_child(save)
        # All changes have been tried.
        if ended.answer.get("ended"):
            return
        yield number, ended
        number += every


def crash_points(held: HeldRun, scratch: Path, every: int = 1) -> Iterator[Fault]:
    """SIGKILL before each change, in all scenarios; ``every``: only each so many-th."""

    def kill(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for scenario in SCENARIOS:
        saves = failing_saves(held, scenario, scratch, every, kill, keep=scenario.keep)
        for number, ended in saves:
            what = f"{scenario.name}: before change {number}"
            yield judged("crash point of a save", what, held, scratch, ended, scenario.may_be)


def cut_writes(held: HeldRun, scratch: Path, times: int, seed: int) -> Iterator[Fault]:
    """SIGXFSZ, which ends a process, in the middle of a write."""
    # The same seed cuts the same files.
    chance = random.Random(seed)
    sizes = _sizes(held, scratch)
    for _ in range(times):
        scenario = chance.choice(SCENARIOS)
        folder = scenario.begin(held, scratch)
        # So that small files are cut as often as large ones.
        limit = chance.randrange(1, chance.choice(sizes))

        def save(folder: Path = folder, scenario: Scenario = scenario, limit: int = limit) -> Any:
            # Python ignores the signal otherwise.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            held.save(folder, scenario.step, keep=scenario.keep)
            return {"ended": True}

        ended = in_child(save)
        what = f"{scenario.name}: killed at byte {limit:,} of a file"
        yield judged("kill in the middle of a write", what, held, folder, ended, scenario.may_be)


def _sizes(held: HeldRun, scratch: Path) -> list[int]:
    folder = SCENARIOS[1].begin(held, scratch)
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE)


def disk_errors(held: HeldRun, scratch: Path, every: int = 1) -> Iterator[Fault]:
    """An error of the disk in place of each change."""

    def code_of(number: int) -> int:
        return ERRORS[number % len(ERRORS)]

    def fail(number: int) -> None:
        raise OSError(code_of(number), os.strerror(code_of(number)))

    for scenario in SCENARIOS:
        saves = failing_saves(held, scenario, scratch, every, fail, keep=scenario.keep)
        for number, ended in saves:
            what = f"{scenario.name}: {errno.errorcode[code_of(number)]} at change {number}"
            yield judged("error of the disk", what, held, scratch, ended, scenario.may_be)


def removed_folders(held: HeldRun, scratch: Path, every: int = 1) -> Iterator[Fault]:
    """The run folder vanishes before each change; no other one may be made in its place."""
    scenario = SCENARIOS[1]
    saves = failing_saves(held, scenario, scratch, every, lambda number: shutil.rmtree(scratch))
    for number, ended in saves:
        what = f"{scenario.name}: before change {number}"
        said = ended.answer.get("refused", "")
        there = [path.name for path in scratch.rglob("*")] if scratch.exists() else []
        result = REFUSED if is_line(said) and not there else HANG if ended.hung else LOST
        detail = said or f"{ended.answer} signal {ended.signal}"
        yield Fault("run folder removed", what, result, ended.seconds, detail, tuple(there))


def full_disks(held: HeldRun, scratch: Path, times: int, seed: int) -> Iterator[Fault]:
    """A file system of its own that is full behind so many bytes; afterwards there is room again.
    Every fourth one is read-only instead. Needs the right to mount (root)."""
    chance = random.Random(seed)
    scenario = SCENARIOS[1]
    for number in range(times):
        mount = scratch.with_name("disk")
        mount.mkdir(exist_ok=True)
        # From nothing to more than a checkpoint takes.
        room_kib = 4 * chance.randrange(0, 400)
        read_only = number % 4 == 3

        def all_of_it(mount: Path = mount, room: int = room_kib, ro: bool = read_only) -> Any:
            return _on_small_disk(held, mount, scenario, room, read_only=ro)

        ended = in_child(all_of_it)
        what = "read-only" if read_only else f"full behind {room_kib:,} KiB more"
        answer = ended.answer
        kind = "full or read-only disk"
        if ended.hung or "fault" not in answer:
            result = HANG if ended.hung else LOST
            yield Fault(kind, what, result, ended.seconds, f"{answer} signal {ended.signal}")
            continue
        result, detail, left = answer["fault"]
        yield Fault(kind, what, result, ended.seconds, detail, tuple(left))


def _on_small_disk(
    held: HeldRun, mount: Path, scenario: Scenario, room_kib: int, *, read_only: bool
) -> dict[str, Any]:
    """Save on a small disk, make room, resume; in a child with mounts of its own."""
    libc = ctypes.CDLL(None, use_errno=True)

    def mounted(source: bytes, target: Path, flags: int, options: bytes | None) -> None:
        if libc.mount(source, str(target).encode(), b"tmpfs", flags, options):
            raise OSError(ctypes.get_errno(), "mount")

    remount, readonly, private = 32, 1, (1 << 18) | (1 << 14)
    # Mounts of this process alone, which end with it.
    os.unshare(os.CLONE_NEWNS)
    # Else they would be seen by the parent all the same.
    mounted(b"none", Path("/"), private, None)
    mounted(b"tmpfs", mount, 0, b"size=64m")
    folder = scenario.begin(held, mount / "run")
    used = os.statvfs(mount)
    used_kib = (used.f_blocks - used.f_bfree) * used.f_frsize // 1024
    if read_only:
        mounted(b"tmpfs", mount, remount | readonly, b"size=64m")
    else:
        mounted(b"tmpfs", mount, remount, f"size={used_kib + room_kib}k".encode())

    def save() -> dict[str, Any]:
        held.save(folder, scenario.step)
        return {"ended": True}

    ended = in_child(save)
    mounted(b"tmpfs", mount, remount, b"size=64m")
    fault = judged("", "", held, folder, ended, scenario.may_be)
    return {"fault": [fault.result, fault.detail, list(fault.left_over)]}


def judged(
    kind: str, what: str, held: HeldRun, folder: Path, ended: Ended, may_be: set[int | None]
) -> Fault:
    """What became of a run whose save has ended so: what is found when it is resumed must be one of
    these steps, bit for bit."""
    resumed = in_child(lambda: held.resume(folder))
    seconds = ended.seconds + resumed.seconds
    answer = resumed.answer
    said = ended.answer.get("refused", "")
    result = SURVIVED
    detail = said or f"goes on from step {answer.get('step')}"
    if ended.hung or resumed.hung:
        result = HANG
    # A failure must be said in a line; a kill says nothing.
    elif "crashed" in ended.answer or (said and not is_line(said)):
        result = LOST
        detail = f"the save ended with {ended.answer}"
    # A step has its name only when it is whole.
    elif answer.get("step", "") is None and checkpoints(folder):
        result = LOST
        detail = f"begins afresh beside {checkpoints(folder)[-1].name}"
    elif answer.get("step", "") not in may_be or not answer["same"]:
        result = LOST
        detail = f"{answer or resumed.signal}, may be {may_be}"
    return Fault(kind, what, result, seconds, detail, tuple(answer.get("left", ())))


def is_line(said: str) -> bool:
    """Whether a message is for a user: a line, or a few with what to do."""
    return bool(said) and said.count("\n") <= 3 and "Traceback" not in said
