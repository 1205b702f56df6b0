"""Kill a save, or let it fail, before each of its changes of the file system: a whole, right
checkpoint must be found after it."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalora.adapters.latest import checkpoints, read_latest
from megalora.train.checkpoint.writer import (
    checkpoint_name,
    point_latest_at,
    recover,
    remove,
)
from tests.train.folders import copied, found, mark_of, save_filled

# Names of Python's audit events; opening a file for writing is one more.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
NEW = 0.5
"""Mark of the save under test; the others are marked by their step."""


class KilledError(BaseException):
    """Stands for SIGKILL: from here on nothing changes any more, clean-up included."""


class Crash:
    """Counts changes of the file system, and lets the k-th fail.

    As a kill: that and all later ones, so that the folder stays as a killed process leaves it. As a
    full disk: that one alone. Python's audit hooks see every change but fsync; they stay for the
    life of the process, so there is one for all.
    """

    def __init__(self) -> None:
        self.k = 0
        self.count = 0
        self.kill = True
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        writes = (
            event == "open"
            and isinstance(arguments[1], str)
            and bool(set(arguments[1]) & set("wax"))
        )
        # A hook runs before what it is told of: the change has not happened yet.
        if self.k and (event in CHANGES or writes):
            self.change()
        if self.k and writes and os.path.exists(str(arguments[0])):
            self._half_open(str(arguments[0]))

    def _half_open(self, path: str) -> None:
        """To open a file for writing empties it: a kill may come before anything is written."""
        if self.kill and self.count + 1 == self.k:
            # With k at zero the hook lets this very truncation through.
            k = self.k
            self.k = 0
            os.truncate(path, 0)
            self.k = k
        self.change()

    def change(self) -> None:
        self.count += 1
        if self.kill and self.count >= self.k:
            raise KilledError
        if self.count == self.k:
            raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def before(self, k: int, kill: bool) -> Iterator[None]:
        fsync = os.fsync
        # Nothing here outlives the machine: forcing to disk would only take time. It counts as a
        # change, because a save may fail there.
        os.fsync = lambda _: self.change()
        self.k = k
        self.count = 0
        self.kill = kill
        try:
            yield
        except (KilledError, OSError, ValueError):
            assert self.count >= k, "the action itself is broken"
        finally:
            self.k = 0
            os.fsync = fsync


CRASH = Crash()


def with_crash(action: Callable[[], object], k: int, kill: bool = True) -> bool:
    """Do ``action`` until its k-th change; whether there was one."""
    with CRASH.before(k, kill):
        action()
    return CRASH.count >= k


def saved(run: Path, *steps: int, latest: int | None = None) -> Path:
    """A run folder with checkpoints of these steps."""
    run.mkdir()
    for step in steps:
        save_filled(run / checkpoint_name(step))
    if latest is not None:
        point_latest_at(run / checkpoint_name(latest))
    return run


def again(run: Path, step: int) -> Callable[[], None]:
    """The save under test, whose checkpoint is told from an earlier one of its step by ``NEW``."""
    return lambda: save_filled(run / checkpoint_name(step), NEW)


# Steps that are there, the one that latest names (None: the last), the step that is saved, and the
# marks that a run may go on from after a crash: what it would have gone on from before, or the new.
@pytest.mark.parametrize("kill", [True, False], ids=["killed", "full disk"])
@pytest.mark.parametrize(
    ("before", "latest", "step", "may_be"),
    [
        ([], None, 1, {None, NEW}),
        ([1], None, 2, {1, NEW}),
        ([1, 2], 1, 2, {1, NEW}),
        # As after a roll-back: latest names what is replaced. Between the two renames of the
        # replacement, step 1 is the newest.
        ([1, 2], 2, 2, {2, 1, NEW}),
        ([1], None, 1, {1, NEW}),
        ([1, 2, 4], 4, 2, {4, NEW}),
    ],
    ids=["first", "second", "latest behind", "named by latest", "the only one", "an earlier one"],
)
def test_every_crash_point_of_a_save(
    before: list[int], latest: int | None, step: int, may_be: set, kill: bool, tmp_path: Path
) -> None:
    start = saved(tmp_path / "start", *before, latest=latest)
    # Marks of the checkpoints found after a crash, over all k.
    seen = set()
    k = 1
    # Until the save ends before its k-th change: then every one of them has been a crash point.
    while True:
        run = copied(start, tmp_path / "run")
        more = with_crash(again(run, step), k, kill)
        # At no moment does latest name nothing, or half a checkpoint, unless it names the only one
        # there is, which is being replaced.
        if read_latest(run) and before != [step]:
            mark_of(read_latest(run))
        recover(run)
        state = found(run).state
        if state is None:
            assert not checkpoints(run), "never a fresh start beside checkpoints"
            seen.add(None)
        else:
            seen.add(mark_of(state.folder))
        left_behind = [path for path in run.iterdir() if path.name.startswith(".")]
        assert not left_behind
        if not more:
            break
        k += 1
    # A hook that sees nothing would end the loop at once.
    assert k > 10
    assert seen <= may_be and NEW in seen
    assert mark_of(run / checkpoint_name(step)) == NEW


def test_a_removed_run_folder_is_not_made_anew(tmp_path: Path) -> None:
    """It would lack the run's config and its earlier checkpoints."""
    with pytest.raises(ValueError, match="could not save step_000001; earlier checkpoints are"):
        save_filled(tmp_path / "gone/step_000001")
    assert not list(tmp_path.iterdir())


def test_every_crash_point_of_forgetting_and_of_recovering(tmp_path: Path) -> None:
    start = saved(tmp_path / "start", 1, 2)
    save_filled(start / "step_000003")
    # A save that never ended, and a replacement that was killed just before the new checkpoint took
    # the old one's place.
    save_filled(start / "step_000004")
    (start / "step_000004").rename(start / ".step_000004.tmp")
    point_latest_at(start / "step_000003")
    (start / "step_000003").rename(start / ".step_000003.old")

    def forget_and_recover(run: Path) -> None:
        recover(run)
        remove(run / "step_000001")

    k = 1
    more = True
    while more:
        run = copied(start, tmp_path / "run")
        more = with_crash(lambda run=run: forget_and_recover(run), k)
        recover(run)
        state = found(run).state
        assert state is not None and state.step == 3
        assert mark_of(state.folder) == 3
        # What is half forgotten is no checkpoint any more.
        for folder in checkpoints(run):
            mark_of(folder)
        k += 1
    assert k > 10
    assert [folder.name for folder in checkpoints(run)] == ["step_000002", "step_000003"]
