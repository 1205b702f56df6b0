"""One fault of each kind of ``make chaos`` that takes no whole run, and what its driver takes for a
loss."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from operator import attrgetter
from pathlib import Path

import pytest

from benchmarks.chaos import damage, saves
from benchmarks.chaos.children import in_child
from benchmarks.chaos.fault import HANG, LOST, REFUSED, SURVIVED, Fault
from benchmarks.chaos.held_run import HeldRun, held_run
from benchmarks.chaos.scene import Scene, make_scene
from benchmarks.chaos.table import rows_of, table_of

SEED = 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def held(scene: Scene) -> Iterator[HeldRun]:
    with held_run(scene) as run:
        yield run


@pytest.fixture
def scratch(scene: Scene) -> Path:
    return scene.run("scratch")


def results_of(faults: list[Fault]) -> set[str]:
    return set(map(attrgetter("result"), faults))


def test_how_children_end() -> None:
    def refuse() -> dict:
        raise ValueError("a line")

    def crash() -> dict:
        raise KeyError("a bug")

    def die() -> dict:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    assert in_child(lambda: {"a": 1}).answer == {"a": 1}
    assert in_child(refuse).answer == {"refused": "a line"}
    assert in_child(crash).answer == {"crashed": "KeyError: 'a bug'"}
    assert in_child(die).signal == signal.SIGKILL
    assert in_child(lambda: signal.pause() or {}, limit_s=0.2).hung
    assert in_child(endless, limit_s=0.2).hung
    # One that works a while longer on a busy machine has not hung: it has processor time to go.
    assert not in_child(lambda: sleep_and_work(0.6), limit_s=0.4).hung


def endless() -> dict:
    while True:
        pass


def sleep_and_work(seconds: float) -> dict:
    """Take little processor time, and some of it all the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)
        sum(range(100_000))
    return {}


def test_a_save_that_is_killed_or_fails(held: HeldRun, scratch: Path) -> None:
    """A few of all the points, in every scenario."""
    faults = [*saves.crash_points(held, scratch, 13), *saves.disk_errors(held, scratch, 17)]
    faults += saves.cut_writes(held, scratch, 2, SEED)
    assert results_of(faults) == {SURVIVED}, faults
    assert not any(fault.left_over for fault in faults)
    names = {fault.what.split(":")[0] for fault in faults}
    assert names == {scenario.name for scenario in saves.SCENARIOS}
    steps = set(map(attrgetter("detail"), faults))
    # Both sides of a commit.
    assert {"goes on from step 1", "goes on from step 2", "goes on from step 3"} <= steps


def test_every_point_of_a_first_save(
    held: HeldRun, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the step's name and ``latest``, too, where no other checkpoint is there."""
    monkeypatch.setattr(saves, "SCENARIOS", saves.SCENARIOS[:1])
    faults = list(saves.crash_points(held, scratch))
    assert results_of(faults) == {SURVIVED}, faults
    found = set(map(attrgetter("detail"), faults))
    assert found == {"goes on from step None", "goes on from step 1"}


def test_a_run_folder_that_vanishes(held: HeldRun, scratch: Path) -> None:
    faults = list(saves.removed_folders(held, scratch, 13))
    assert results_of(faults) == {REFUSED}, faults
    # Behind the last rename, when older checkpoints would be removed.
    assert any("has been saved, and has vanished since" in fault.detail for fault in faults)


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_and_a_read_only_disk(held: HeldRun, scratch: Path) -> None:
    faults = list(saves.full_disks(held, scratch, 4, SEED))
    assert results_of(faults) == {SURVIVED}, faults
    said = " ".join(fault.detail for fault in faults)
    assert "No space left on device" in said and "Read-only file system" in said


def test_damaged_files(held: HeldRun, scratch: Path) -> None:
    faults = list(damage.damaged_checkpoints(held, scratch, 2 * 11, SEED))
    faults += damage.torn_checkpoints(held, scratch)
    faults += damage.damaged_inputs(held, scratch, 3, SEED)
    faults += damage.damaged_configs(held, scratch, 4, SEED)
    assert results_of(faults) == {SURVIVED, REFUSED}, faults
    flipped = [fault for fault in faults if "rank_00000.safetensors: bit" in fault.what]
    assert flipped and all("SHA-256" in fault.detail for fault in flipped)
    # Whole in itself, and of another step than its folder: the step before is the newest whole one.
    mixed = [fault for fault in faults if "state.json: that of the step before" in fault.what]
    assert [fault.detail for fault in mixed] == ["goes on from step 2"]


@pytest.mark.parametrize("how", [damage._flip, damage._make_folder])
def test_each_file_of_a_run_folder(
    how: Callable[..., str], held: HeldRun, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in turn, so that none of a checkpoint can be another and be resumed from."""
    monkeypatch.setattr(damage, "DAMAGES", (how,))
    files = len(damage.CHECKPOINT_FILES)
    faults = list(damage.damaged_checkpoints(held, scratch, files, SEED))
    assert results_of(faults) <= {SURVIVED, REFUSED}, faults
    tried = {fault.what.partition(":")[0] for fault in faults}
    newest = scratch.with_name("whole") / damage.NEWEST
    there = [path for path in newest.rglob("*") if path.is_file()]
    assert {path.relative_to(newest.parent).as_posix() for path in there} <= tried


def test_what_is_lost(held: HeldRun, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of another step, and a fresh start beside checkpoints."""
    monkeypatch.setattr(held, "digests", {step: "" for step in held.digests})
    (fault,) = islice(saves.crash_points(held, scratch, 99), 1, 2)
    assert fault.result == LOST and "'same': False" in fault.detail
    # The lock file, whose content decides nothing here.
    (fault,) = islice(damage.damaged_checkpoints(held, scratch, 11, SEED), 9, 10)
    assert fault.result == LOST


def test_faults_are_counted() -> None:
    faults = [
        Fault("a", "", SURVIVED, 1.0), Fault("a", "", LOST, 2.0), Fault("a", "", REFUSED, 6.0),
        Fault("b", "", HANG, 60.0, left_over=("x",)),
    ]  # fmt: skip
    rows = rows_of(faults)
    assert rows[0] == {
        "kind": "a", "times": 3, "survived": 1, "refused": 1, "lost": 1, "hang": 0, "left_over": 0,
        "median_seconds": 2.0, "longest_seconds": 6.0,
    }  # fmt: skip
    assert rows[1]["hang"] == rows[1]["left_over"] == 1
    assert table_of(rows).splitlines()[-1] == "| all | 4 | 1 | 1 | 1 | 1 |  |  |"
