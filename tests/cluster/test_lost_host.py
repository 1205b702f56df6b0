"""A host is killed with its disk, or cut off, and a spare goes on from the snapshots that its
neighbour holds (``megalora train --nnodes``)."""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalora.data.arithmetic import write_arithmetic
from tests.cluster.hosts import (
    HOSTS,
    SPARE,
    Host,
    Node,
    call,
    cut,
    ended,
    kill_all,
    logs,
    mend,
    missing,
    spare_host,
    two_hosts,
)
from tests.cluster.test_two_hosts import RUN_S, metrics, wait_for_step

pytestmark = pytest.mark.cluster
STEPS = 20
KILLED_BEHIND = 8
"""The step that is logged when the host is lost."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    if reason := missing():
        pytest.skip(reason)
    with two_hosts(), spare_host():
        yield


def disk(folder: Path, host: Host) -> Path:
    """The disk of a host, which it sees as ``folder / "disk"``."""
    return folder / f"disk-{host.name}"


def fill_disk(folder: Path, host: Host, base: Path) -> None:
    shutil.copytree(base, disk(folder, host) / "base")
    write_arithmetic(disk(folder, host) / "sums.jsonl", 1024, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Base and data on a disk of each host, and a config that reads them there: PP 2 between hosts,
    EP 2 inside each. Nothing is saved before the end."""
    folder = tmp_path_factory.mktemp("lost_host")
    (folder / "disk").mkdir()
    for host in (*HOSTS, SPARE):
        fill_disk(folder, host, tiny)
    sections = {
        "model": {"path": str(folder / "disk" / "base"), "dtype": "float32"},
        "parallel": {"pp": 2, "ep": 2},
        "lora": {"rank": 4, "target_modules": "all-linear"},
        "data": {"train": str(folder / "disk" / "sums.jsonl"), "max_length": 128},
        "train": {
            "steps": STEPS, "global_batch_size": 64, "micro_batch_size": 2, "lr": 1e-2,
            "check_base": "off",
        },
        "log": {"tensorboard": False},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(sections))
    return folder


def train(folder: Path, host: Host, run: Path, *more: str) -> Node:
    """``megalora train`` of a run that goes on from memory."""
    command = [
        sys.executable, "-m", "megalora", "train", folder / "run.yaml", f"checkpoint.dir={run}",
        "--max-restarts", "3", *more,
    ]  # fmt: skip
    # What a host has mounted only it sees: ``ip netns exec`` makes a namespace for that, too.
    mounting = f'mount --bind {disk(folder, host)} {folder / "disk"} && exec "$0" "$@"'
    settings = {"MEGALORA_TOKEN": "a token of this test", "LOCAL_ADDR": host.name}
    return call(host, run.parent, ["sh", "-c", mounting, *command], settings)


@pytest.fixture(scope="module")
def undisturbed(hosts: None, folder: Path) -> dict[int, tuple[float, float]]:
    """Metrics of the same layout on one host, which nobody disturbs."""
    run = folder / "run"
    node = train(folder, SPARE, run, "checkpoint.snapshots={every: 1}", "--nproc", "4")
    assert ended([node], within_s=RUN_S) == [0], logs([node])
    return metrics(run)


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_host_is_lost_and_a_spare_goes_on(
    how: str, undisturbed: dict[int, tuple[float, float]], folder: Path, tmp_path: Path, tiny: Path
) -> None:
    port = 29612 if how == "killed" else 29613
    run = tmp_path / "run"
    nodes: list[Node] = []
    for host, words in ((HOSTS[0], "node 0"), (HOSTS[1], "node 1"), (SPARE, "as a spare")):
        more = ["--nproc", "2", "--nnodes", "2", "--meet", f"host-a:{port}"]
        snapshots = "checkpoint.snapshots={every: 1, replicate: 1}"
        nodes.append(train(folder, host, run, snapshots, *more))
        wait_for_words(nodes, words)
    first, lost, spare = nodes
    wait_for_step(run, KILLED_BEHIND, nodes)
    before = max(metrics(run))
    began = time.monotonic()
    try:
        if how == "killed":
            kill_all(lost.host)
            shutil.rmtree(disk(folder, lost.host))
        else:
            cut()
        # The steps from memory are trained again, so the log has them twice for a while.
        resumed = resumed_step(nodes[::2])
        last = before_the_loss(first)
        wait_for_step(run, max(before, last) + 1, [first, spare])
        print(f"\n{how}: {time.monotonic() - began:.1f} s to step {last + 1}, from {resumed}")
        assert not list(run.glob("step_*")), "nothing was to be on the disk"
        assert ended([first, spare], within_s=RUN_S) == [0, 0], logs(nodes)
    finally:
        kill_all(lost.host)
        mend()
        # For the other case.
        if not disk(folder, lost.host).exists():
            fill_disk(folder, lost.host, tiny)
    assert 0 <= last - resumed <= 1, logs(nodes)
    # Bit for bit, each step once.
    assert metrics(run) == undisturbed


def wait_for_words(nodes: list[Node], words: str) -> None:
    deadline = time.monotonic() + RUN_S
    while words not in nodes[-1].said():
        assert time.monotonic() < deadline, logs(nodes)
        time.sleep(0.1)


def resumed_step(nodes: list[Node]) -> int:
    """The step in memory that all go on from, once they do."""
    deadline = time.monotonic() + RUN_S
    while time.monotonic() < deadline:
        found = re.search(r"going on from step (\d+) in memory", logs(nodes))
        if found is not None:
            return int(found[1])
        time.sleep(0.02)
    raise AssertionError(logs(nodes))


def before_the_loss(node: Node) -> int:
    """The last step that was said before all started again."""
    said = node.said().partition("starting all ranks again")[0]
    return max(int(step) for step in re.findall(r"^\s*step (\d+)", said, re.MULTILINE))
