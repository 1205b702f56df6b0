"""Compare where the host waits for a GPU in training with the whole list of places where it may, by
layout. A tensor on the wrong device ends a scenario.

A wait that is not listed fails a test, and so does one that is listed and gone: the list stays
true. Every wait is written as ``kind: file:function`` with how often it comes; the scenarios are in
``scenarios.py``, what counts as a wait is in ``device.py``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pretended.recorder import Recorder
from tests.pretended.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]

METRICS = {"values to the host: megalora/train/assemble.py:Run.step.<locals>.may_change": 1}
"""Loss and gradient norm, read together once a step."""
ALIVE = {"values to the host: megalora/lora/coverage.py:GradientCheck._alive": 1}
"""Whether every projection has a gradient: in the first step, and in the first after B has
moved."""


def splits(times: int) -> dict[str, int]:
    """How many rows go to whom, before each all-to-all of a forward pass through a layer: an
    all-to-all needs them on the host."""
    return {"synchronize: megalora/host.py:HostCopy.wait": times}


def build(replicas: int, linears: int) -> dict[str, int]:
    """Once, before training.

    Args:
        replicas: buffers of the optimizer, one or two.
        linears: adapted Megatron modules of this rank.
    """
    optimizer = "megatron/core/optimizer/optimizer.py:MixedPrecisionOptimizer"
    return {
        "copy from pageable memory: megalora/model/build.py:make_chunks": 1,
        "copy from pageable memory: megalora/lora/adapted_model.py:adapt_base": 1,
        "copy from pageable memory: megalora/lora/factors.py:LoRAFactors.reset_parameters": linears,
        "copy from pageable memory: megalora/lora/coverage.py:check_coverage": 1,
        "values to the host: megalora/lora/coverage.py:check_coverage": 1,
        "exchange of objects: megatron/core/optimizer/__init__.py:_get_param_groups": 2,
        f"copy from pageable memory: {optimizer}.__init__": replicas,
        "copy from pageable memory: megalora/lora/coverage.py:_Parts.to": 2,
    }


def whole_run(replicas: int, linears: int, passes: int) -> dict[str, dict[str, int]]:
    """Every phase of a run on a rank.

    Args:
        passes: forward passes through MoE layers that exchange rows, in a step and in an
            evaluation; half as many in a probe.
    """

    def exchanged(times: int) -> dict[str, int]:
        return splits(times) if passes else {}

    return {
        "build": build(replicas, linears),
        "first step": METRICS | ALIVE | exchanged(passes),
        "second step": METRICS | ALIVE | exchanged(passes),
        "step": METRICS | exchanged(passes),
        "drift": {"item: megalora/train/drift.py:DriftCheck.run": 1},
        "evaluate": {"values to the host: megalora/train/step.py:_mean": 1} | exchanged(passes),
        "probe": (
            {"values to the host: megalora/train/probe.py:Probe.run": 1} | exchanged(passes // 2)
        ),
        # Copies to page-locked memory that nobody but the saving thread waits for.
        "save": {},
    }


STEPS: dict[str, dict[str, int]] = {
    "float32_full": METRICS,
    "many_rows": METRICS,
    "many_rows_dropout_selective": METRICS,
    "tp2_shared_dropout": METRICS,
    # One MoE layer, one microbatch. Selective recomputation does not repeat the exchange ...
    "ep2_selective": METRICS | splits(1),
    # ... full recomputation does: forward twice.
    "ep2_etp2_float32_dropout_full": METRICS | splits(2),
    # One of the two layers is on this rank; two microbatches.
    "pp2_first_stage": METRICS | splits(2),
    # Without expert parallelism nothing is exchanged.
    "pp2_last_stage": METRICS,
    # Two of the four layers (etp exchanges as ep does), two microbatches.
    "pp2_vpp2_etp2": METRICS | splits(4),
    # Context parallelism exchanges keys and values of sizes that the host knows.
    "packed": METRICS,
    "cp2_packed": METRICS,
    "tp2_cp2_ep2_packed_full": METRICS | splits(2),
    "pp2_cp2_packed_selective": METRICS,
    "pp2_vpp2_cp2_packed": METRICS,
    # Forward twice: of the reference, and of the step.
    "pairs_cp2_ep2_packed": METRICS | splits(2),
}
# Six adapted modules each: qkv, proj, router, the experts' gate_up and down, head. With expert
# parallelism Megatron keeps one buffer for dense parameters and one for the experts'.
RUNS = {"one_gpu": whole_run(1, 6, 0), "tp2_ep2": whole_run(2, 6, 2)}


# One rank, every kind of parallel rank, and a row cut by context parallelism; the others take a
# second each.
FAST = ("one_gpu", "tp2_ep2", "cp2_packed")
BY_NAME: list[Any] = []
for _scenario in SCENARIOS:
    _marks = [] if _scenario.name in FAST else [pytest.mark.slow]
    BY_NAME.append(pytest.param(_scenario.name, marks=_marks))


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What every scenario asked for did, from a process in which autograd meets the pretended
    device before its first pass."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)  # kernels as a GPU would have them
    # Only scenarios of tests that were selected: one seeded bug, or one -k, needs one of them.
    names: set[str] = set()
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        if item.path == request.path and callspec is not None and "name" in callspec.params:
            names.add(callspec.params["name"])
    # No name would mean all; "none" is no scenario, and leaves the mistakes alone.
    command = [sys.executable, "-m", "tests.pretended.run", *(names or ["none"])]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", BY_NAME)
def test_host_waits_only_where_the_list_says(name: str, seen: dict[str, Any]) -> None:
    assert seen[name]["error"] is None, seen[name]["error"]
    if name in RUNS:
        assert seen[name]["waits"] == RUNS[name]
    else:
        assert seen[name]["waits"]["step"] == STEPS[name]


def test_every_scenario_is_on_the_list() -> None:
    assert {scenario.name for scenario in SCENARIOS} == STEPS.keys() | RUNS.keys()


@pytest.mark.parametrize("name", BY_NAME)
def test_batches_travel_in_one_copy_a_step(name: str, seen: dict[str, Any]) -> None:
    assert seen[name]["copies"]["step"] == {"megalora/host.py:to_device": 1}


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("one_gpu", "_gemm_kernel"),
        pytest.param("many_rows", "grouped_mm", marks=pytest.mark.slow),
        pytest.param("many_rows_dropout_selective", "grouped_mm", marks=pytest.mark.slow),
    ],
)
def test_back_end_is_the_one_for_the_number_of_rows(
    name: str, takes: str, seen: dict[str, Any]
) -> None:
    """Torch's grouped GEMM from 1,024 rows an expert on, and Triton's below; passes between GEMMs
    are Triton's in both."""
    # one_gpu has 2 x 32 tokens with two experts each: 16 rows for each of 8 experts. The others
    # have 8,192.
    kernels = seen[name]["kernels"]["step"]
    assert {"_gemm_kernel", "grouped_mm"} & kernels.keys() == {takes}
    assert {
        "_shrink_kernel",
        "_swiglu_kernel",
        "_swiglu_backward_kernel",
        "_wgrad_kernel",
    } <= kernels.keys()


@pytest.mark.parametrize(("name", "parts"), [("one_gpu", 1), ("tp2_ep2", 2)])
def test_an_optimizer_step_is_one_launch_for_each_part(
    name: str, parts: int, seen: dict[str, Any]
) -> None:
    """Dense factors and those of experts, where expert parallelism divides them apart."""
    assert seen[name]["kernels"]["step"]["fused AdamW"] == parts


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        pytest.param("float32_full", 0, 0, marks=pytest.mark.slow),
        # Calls: one for a whole row, two for the two chunks that context parallelism leaves a rank.
        pytest.param("packed", 1, 1, marks=pytest.mark.slow),
        ("cp2_packed", 2, 2),
        # Attention is recomputed, with the keys gathered anew.
        pytest.param("tp2_cp2_ep2_packed_full", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_documents_are_attended_to_by_flash_attention(
    name: str, forward: int, backward: int, seen: dict[str, Any]
) -> None:
    """In 16 bits, one call for all documents of a chunk; one layer and one row each."""
    kernels = seen[name]["kernels"]["step"]
    assert kernels.get("flash attention", 0) == forward
    assert kernels.get("flash attention, backward", 0) == backward


@pytest.mark.parametrize(
    "mistake",
    ["item", "tolist", "nonzero", "mask", "pageable", "blocking", "compiled", "mixed devices"],
)
def test_what_the_device_is_for(mistake: str, seen: dict[str, Any]) -> None:
    """The device itself: each mistake alone is seen, and what is free is not."""
    assert seen["mistakes"][mistake], f"{mistake} went unseen"
    assert not seen["mistakes"]["none"]


def test_a_phase_ends_where_something_in_it_fails() -> None:
    """Else the set-up of the next scenario would be counted under the failed one's last phase."""
    recorder = Recorder()
    with pytest.raises(ValueError), recorder.phase("step"):
        raise ValueError("a scenario that does not run to its end")
    recorder.wait("item")
    assert recorder.waits == {"step": {}}
