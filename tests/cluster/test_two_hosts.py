"""launch/torchrun_node.sh on two hosts: they find each other, train one adapter, notice when one is
cut off, and resume."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalora.data.arithmetic import write_arithmetic
from tests.cluster.hosts import (
    HOSTS,
    Node,
    cut,
    ended,
    logs,
    mend,
    missing,
    received_bytes,
    start,
    two_hosts,
)

pytestmark = pytest.mark.cluster
RUN_S = 900
"""Limit of a whole run, which takes 25 s on two idle cores."""
STEPS = 24
TIMEOUT_MINUTES = 0.75
"""How long a rank waits for another: more than starts may drift apart on a busy machine."""
ENDING_S = 60 * TIMEOUT_MINUTES + 120
"""Limit from the cut to the end: that wait, torchrun's own with its store (60 s), and the exits."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    if reason := missing():
        pytest.skip(reason)
    with two_hosts():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """PP 2 between the hosts (the outermost of Megatron's dimensions), EP 2 within each."""
    folder = tmp_path_factory.mktemp("cluster")
    write_arithmetic(folder / "sums.jsonl", 256, seed=0)
    sections = {
        "model": {"path": str(tiny), "dtype": "float32"},
        "parallel": {"pp": 2, "ep": 2},
        "lora": {"rank": 4, "target_modules": "all-linear"},
        "data": {"train": str(folder / "sums.jsonl"), "max_length": 128},
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-2},
        "checkpoint": {"every": 4},
        "log": {"tensorboard": False},
    }
    path = folder / "two_hosts.yaml"
    # Every JSON file is a YAML file.
    path.write_text(json.dumps(sections))
    return path


def metrics(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step that is written down."""
    path = run / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        # The run goes on meanwhile: its last line may be half written.
        if not line.endswith("}"):
            continue
        row = json.loads(line)
        # Evaluations have rows of their own.
        if "loss" in row:
            found[row["step"]] = (row["loss"], row["grad_norm"])
    return found


def wait_for_step(run: Path, step: int, nodes: list[Node]) -> None:
    deadline = time.monotonic() + RUN_S
    while max(metrics(run), default=0) < step:
        for node in nodes:
            assert node.process.poll() is None, f"ended before step {step}\n{logs(nodes)}"
        assert time.monotonic() < deadline, f"no step {step}\n{logs(nodes)}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(
    hosts: None, config: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[float, float]]:
    """Metrics of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    nodes = start(folder, 29511, config, f"checkpoint.dir={folder / 'run'}")
    assert ended(nodes, within_s=RUN_S) == [0, 0], logs(nodes)
    said = logs(nodes)
    assert "on 4 x CPU: tp=1 pp=2 vpp=1 dp=2, experts etp=1 ep=2 edp=1" in said
    assert f"finished at step {STEPS}" in said
    assert (folder / "run" / f"step_{STEPS:06d}" / "adapter_model.safetensors").is_file()
    # 24 steps of 8 samples: activations of one stage cross to the other, and their gradients back.
    assert all(received_bytes(host) > 1_000_000 for host in HOSTS)
    return metrics(folder / "run")


def test_two_hosts_train_one_adapter(whole: dict[int, tuple[float, float]]) -> None:
    assert list(whole) == list(range(1, STEPS + 1))
    # Sums of two numbers are learned fast: the loss falls by more than 1 in 24 steps.
    assert whole[STEPS][0] < whole[1][0] - 1


def test_a_host_is_cut_off_then_the_run_resumes(
    whole: dict[int, tuple[float, float]], config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    nodes = start(
        tmp_path, 29512, config, f"checkpoint.dir={run}", f"train.timeout_minutes={TIMEOUT_MINUTES}"
    )
    # Step 4 has been saved, so there is something to resume from.
    wait_for_step(run, 6, nodes)
    cut()
    codes = ended(nodes, within_s=ENDING_S)
    assert 0 not in codes, logs(nodes)
    saved = (run / "latest").read_text().strip()
    for node in nodes:
        # A rank names its host by LOCAL_ADDR, which torchrun_node.sh sets: node 0's is its name.
        here = re.escape(node.host.address if node.host.node_rank else node.host.name)
        # Node 0 hears nothing of the other's ranks, and the other nothing of the store.
        reason = "has not answered" if node.host.node_rank else "lost ranks 2, 3 on"
        assert re.search(rf"megalora \(rank \d.*{here}\): .*{reason}", node.said()), logs(nodes)
        assert f"the last checkpoint is {run / saved}" in node.said()
    assert int(saved.removeprefix("step_")) < STEPS

    mend()
    nodes = start(tmp_path, 29512, config, f"checkpoint.dir={run}", "checkpoint.resume=true")
    assert ended(nodes, within_s=RUN_S) == [0, 0], logs(nodes)
    assert f"continuing from {run / saved}" in logs(nodes)
    # Bit for bit, because sums on a CPU are made in the same order each time.
    assert metrics(run) == whole
