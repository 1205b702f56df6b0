"""Compare what one MoE layer launches with a ceiling, the count of today, for every cell; one
kernel or host operation more fails.

``python -m tests.pretended.launches --names`` prints the table with the kernels of each cell.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pretended.launches import num_kernels

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

CEILINGS = {
    # Forward without adapters: GEMM of gate and up, SwiGLU, GEMM of down, sum over a token's
    # experts. Backward: the same, and a sum of what SwiGLU's programs left in parts (here dp).
    "expert_mlp triton ep1 base forward": (4, 10),
    "expert_mlp triton ep1 base backward": (5, 15),
    # Forward with adapters: S = X A^T of gate and up is a launch of its own; that of down is part
    # of SwiGLU, and B is multiplied within the GEMMs. Backward: dS of both (2 launches), dA of gate
    # and up, dB of down (2); SwiGLU's pass leaves the other gradients in parts.
    "expert_mlp triton ep1 adapters forward": (5, 22),
    "expert_mlp triton ep1 adapters backward": (9, 52),
    # Received rows cost the experts what gathered ones do.
    "expert_mlp triton ep8 base forward": (4, 10),
    "expert_mlp triton ep8 base backward": (5, 15),
    "expert_mlp triton ep8 adapters forward": (5, 22),
    "expert_mlp triton ep8 adapters backward": (9, 52),
    # torch's grouped GEMM is two kernels, and takes rows only in order: a launch gathers them.
    "expert_mlp grouped_mm ep1 base forward": (7, 10),
    "expert_mlp grouped_mm ep1 base backward": (8, 15),
    # Adapters are copied into the columns reserved beside weights and rows: five more kernels.
    "expert_mlp grouped_mm ep1 adapters forward": (12, 44),
    "expert_mlp grouped_mm ep1 adapters backward": (13, 63),
    "expert_mlp grouped_mm ep8 base forward": (7, 10),
    "expert_mlp grouped_mm ep8 base backward": (8, 15),
    "expert_mlp grouped_mm ep8 adapters forward": (12, 44),
    "expert_mlp grouped_mm ep8 adapters backward": (13, 63),
    # A layer adds the router (one product, softmax, top-k and the sort of tokens by expert) ...
    "layer triton ep1 base forward": (17, 36),
    "layer triton ep1 base backward": (14, 31),
    "layer triton ep1 adapters forward": (18, 48),
    # ... with adapters, five gradients added to Megatron's buffers (two A's, three B's) ...
    "layer triton ep1 adapters backward": (23, 78),
    # ... and with 8 ranks, which tokens go to which rank, the counts that the all-to-all needs, and
    # sorting rows after it.
    "layer triton ep8 base forward": (34, 101),
    "layer triton ep8 base backward": (21, 48),
    "layer triton ep8 adapters forward": (35, 113),
    "layer triton ep8 adapters backward": (30, 95),
    "layer grouped_mm ep1 base forward": (20, 36),
    "layer grouped_mm ep1 base backward": (17, 31),
    "layer grouped_mm ep1 adapters forward": (25, 70),
    "layer grouped_mm ep1 adapters backward": (27, 89),
    "layer grouped_mm ep8 base forward": (37, 101),
    "layer grouped_mm ep8 base backward": (24, 48),
    "layer grouped_mm ep8 adapters forward": (42, 135),
    "layer grouped_mm ep8 adapters backward": (34, 106),
    # One chunk of the loss. Frozen: logits, two passes over them with the blocks joined between,
    # and dx, which backward only scales. With an adapter backward makes the logits again.
    "loss base forward": (6, 22),
    "loss base backward": (2, 5),
    "loss adapters forward": (5, 21),
    "loss adapters backward": (11, 27),
}
"""(kernels, host operations)."""


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """Every cell, from a process in which autograd meets the pretended device before its first
    pass."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    # Each changes which back end or which kernel class is taken.
    for name in ("TRITON_INTERPRET", "MEGALORA_BACKEND", "MEGALORA_TUNED"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "tests.pretended.launches", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CEILINGS)
def test_no_cell_exceeds_its_ceiling(name: str, counted: dict[str, Any]) -> None:
    kernels, host_operations = CEILINGS[name]
    cell = counted[name]
    assert num_kernels(cell) <= kernels, cell["kernels"]
    assert cell["host_operations"] <= host_operations


def test_every_cell_has_a_ceiling(counted: dict[str, Any]) -> None:
    assert counted.keys() == CEILINGS.keys()


@pytest.mark.parametrize("backend", ["triton", "grouped_mm"])
def test_adapters_are_counted(backend: str, counted: dict[str, Any]) -> None:
    """The counter sees what it counts: gradients of five factors are sums over rows, and none
    without adapters."""
    for which, has in (("adapters", True), ("base", False)):
        kernels = counted[f"expert_mlp {backend} ep8 {which} backward"]["kernels"]
        assert ("_wgrad_kernel" in kernels) == has and kernels["_sum_parts_kernel"] == 1


def test_gradients_are_taken_by_autograd_as_they_are(counted: dict[str, Any]) -> None:
    """No copy for the layout or the scale of any: nothing of torch runs in the experts'
    backward."""
    # Names of our kernels begin with an underscore, torch's operations do not.
    for name in counted["expert_mlp triton ep8 adapters backward"]["kernels"]:
        assert name.startswith("_"), name


def test_an_expert_parallel_layer_routes_in_six_launches(counted: dict[str, Any]) -> None:
    kernels = counted["layer triton ep8 adapters forward"]["kernels"]
    # The router's choice takes two launches, and two that of ranks; where pairs find their rows,
    # and rows from other ranks, one each.
    launches = {"_count_kernel": 2, "_place_kernel": 2, "_places_kernel": 1, "_regroup_kernel": 1}
    for name, count in launches.items():
        assert kernels[name] == count, name
