"""Ranks that are killed and held up, as ``make chaos`` does. They are forked from a process without
a world of its own, which ``test_chaos.py`` has."""

import pytest

from benchmarks.chaos import ranks, restarts
from benchmarks.chaos.fault import SURVIVED
from benchmarks.chaos.scene import Scene, make_scene

SEED = 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("chaos"))


@pytest.mark.long
def test_ranks_that_are_killed_and_held_up(scene: Scene) -> None:
    faults = list(ranks.disturbed(scene, ["kill", "end"], SEED))
    assert [fault.result for fault in faults] == [SURVIVED, SURVIVED], faults


@pytest.mark.long
@pytest.mark.parametrize("command", restarts.COMMANDS)
def test_torchrun_starts_ranks_again(command: str, scene: Scene) -> None:
    (fault,) = restarts.kill_again_and_again(command, scene, 1, SEED)
    assert fault.result == SURVIVED, fault
