"""Compare the planner's formulas with layers of every registered family, counted on the pretended
GPU: bytes kept for backward and FLOPs of matrix products, layer by layer."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megalora_kernels import AugmentedWeight

from megalora.config import LEVELS, Level, ParallelConfig
from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape
from megalora.model.formats.augmented import Augmented
from megalora.planner.activations import angles_bytes, layer_bytes
from megalora.planner.cost import StageCosts
from megalora.planner.hardware import Constant, Estimate, Kind, Machine, Overhead
from megalora.planner.head_bytes import head_bytes
from megalora.planner.layouts import ParallelLayout
from megalora.planner.ledger import Ledger
from megalora.planner.microbatch import Microbatch
from megalora.planner.weights import PlannedModel, chunks_of
from megalora.planner.workload import Workload
from tests.planner.counted import routing_of_call
from tests.pretended.layer_cases import (
    EVERYTHING,
    HEAD_KIND,
    MICRO_BATCH,
    NOTHING,
    Case,
    cases_of,
    config_of,
    kind_of,
    kinds_of,
    quick_cases_of,
)

ROOT = Path(__file__).parents[2]
FREE = 1e300
"""A rate at which work takes no time."""
NOT_PLANNED = 64
"""Bytes: seeds and offsets of flash attention's dropout, and the loss's scale."""


class NoTime:
    """A network that costs nothing."""

    def seconds(self, kind: Kind, ranks: int, nodes: int, num_bytes: float) -> Estimate:
        return Estimate(0.0, "measured")


ONE_FLOP_A_SECOND = Machine(
    name="counter", memory_bytes=2**60, ranks_per_node=8, gemm=Constant(1.0),
    grouped_gemm=Constant(1.0),
    # The planner's unit is the causal half of the square. torch's registry counts the whole one: 2
    # products forward, 5 backward.
    attention=Constant(1 / 2), attention_backward=Constant(1 / 5), memory=Constant(FREE),
    network=NoTime(),
    overhead=Overhead(0.0, 0.0, 0.0, hidden=True, basis="assumed"),
)  # fmt: skip
"""A machine on which seconds are FLOPs of matrix products."""


def planned(case: Case) -> dict[str, dict[str, int]]:
    """The planner's numbers in the form of ``tests.pretended.layers``. ``backward`` is given where
    the layer's input needs a gradient."""
    world, sizes = case.layout_sizes
    shape = model_shape(config_of(case.family))
    model = PlannedModel(shape, tuple(case.adapted()), case.dropout)
    level: Level = case.recompute  # pyright: ignore[reportAssignmentType]
    layout = ParallelLayout(
        parallel=ParallelConfig(**sizes), num_ranks=world, micro_batch_size=MICRO_BATCH,
        recompute=level,
    )  # fmt: skip
    work = Workload(
        sequence_length=case.sequence, global_batch_size=MICRO_BATCH * layout.dp, dtype=case.dtype  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    costs = StageCosts(model, layout, work, ONE_FLOP_A_SECOND)
    (chunk,) = chunks_of(shape, layout.parallel, 0)
    # A frozen table of rows: nothing is multiplied, and nothing kept.
    found: dict[str, dict[str, int]] = {"embedding": {"kept": 0, "forward": 0, "backward": 0}}
    for layer in chunk.layers:
        # Below the first adapter nothing runs backward. In its own layer, the input needs no
        # gradient, so backward is a part that the planner does not count apart.
        first = model.first_adapted
        kept = 0
        if layer >= first:
            kept = layer_bytes(model, layout, work, layer, layer > first, level)
        if layer == first:
            # One table of rotary angles serves all layers, and counts where it is first kept.
            kept += angles_bytes(model, layout, work, chunk)
        if level == "selective":
            kept -= routing_of_call(model, layout, Microbatch.of(model, layout, work), layer)
        forward = flops(costs.layer(layer, True, level))
        found[str(layer)] = {"kept": kept, "forward": forward}
        if layer > first:
            found[str(layer)]["backward"] = flops(costs.layer(layer, False, level)) - forward
        elif layer < first:
            found[str(layer)]["backward"] = 0
    forward, backward = map(flops, costs.head())
    found["head"] = {
        "kept": head_bytes(model, layout, work), "forward": forward, "backward": backward
    }  # fmt: skip
    return found


def flops(ledger: Ledger) -> int:
    """All products, those that the planner hides behind others included."""
    return round(ledger.total + ledger.hidden_flops)


def count(cases: Iterable[Case]) -> dict[str, Any]:
    """Counts by the case's name, from a process in which autograd meets the pretended device
    before its first pass."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    # What a user or another test may have set, and would change which kernels run.
    for name in ("TRITON_INTERPRET", "MEGALORA_BACKEND", "MEGALORA_TUNED"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "tests.pretended.layers", *(case.name for case in cases)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


ALONE = (
    Case("qwen3_moe", "one rank", "mlp.experts.down", "selective"),
    Case("qwen2_moe", "one rank", "mlp.shared_experts.linear_fc1", "off"),
    Case("qwen2_moe", "one rank", "mlp.shared_experts.linear_fc2", "off"),
    Case("qwen2_moe", "one rank", EVERYTHING, "off"),
    Case("llama", "one rank", "output_layer", "off"),
    Case("glm4_moe", "one rank", "mlp.router", "off"),
)
"""Where a formula that holds for adapters on everything was wrong for one module."""
DROPPED = (
    Case("qwen2_moe", "one rank", EVERYTHING, "off", dropout=True),
    Case("qwen2_moe", "one rank", EVERYTHING, "selective", dropout=True),
)
"""A model with every kind of layer, whose adapters read dropped-out inputs."""


SHARED = (
    Case("qwen3_moe", "one rank", EVERYTHING, "off", share_outer=True),
    Case("qwen3_moe", "one rank", "mlp.experts.down", "selective", share_outer=True),
    Case("qwen3_moe", "one rank", EVERYTHING, "off", dropout=True, share_outer=True),
    Case("qwen3_moe", "tp2 ep2 etp2", EVERYTHING, "full", share_outer=True),
)
"""Experts that share A of gate and up and B of down."""
WITH_DORA = (
    Case("qwen3_moe", "one rank", EVERYTHING, "off", dora=True),
    Case("qwen3_moe", "one rank", "mlp.experts.down", "selective", dora=True),
    Case("qwen3_moe", "tp2 ep2 etp2", EVERYTHING, "full", dora=True),
    # Magnitudes of q alone.
    Case("qwen2_moe", "tp2", NOTHING, "off", dora=True),
)
"""Rows of dense linears and of experts that are scaled, also beside some that are not."""


def cases_asked_for(item: pytest.Item) -> Iterator[Case]:
    """The cases whose counts one test needs: its case, those of its family, or all."""
    parameters = {}
    if hasattr(item, "callspec"):
        parameters = item.callspec.params  # pyright: ignore
    if "case" in parameters:
        yield parameters["case"]
        return
    families = FAMILIES
    if "family" in parameters:
        families = [parameters["family"]]
    for family in families:
        yield from quick_cases_of(family)


@pytest.fixture(scope="module")
def quick(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Counts that the chosen tests ask for, from one process: starting one takes 10 s."""
    # A dict drops repeated cases and keeps the order.
    wanted: dict[Case, None] = {}
    for item in request.session.items:
        if item.path == request.path and "quick" in getattr(item, "fixturenames", ()):
            wanted |= dict.fromkeys(cases_asked_for(item))
    return count(wanted)


def compare(cases: Iterable[Case], counted: dict[str, Any]) -> None:
    """FLOPs to the last one. Of bytes, seeds that flash attention keeps and the loss's scale are
    not planned: ``NOT_PLANNED`` at each place."""
    wrong = []
    for case in cases:
        for place, numbers in planned(case).items():
            for name, said in numbers.items():
                found = counted[case.name][place][name]
                allowed = 0
                if name == "kept":
                    allowed = NOT_PLANNED
                # All of them at once: one wrong formula shows in several places.
                if not found - allowed <= said <= found:
                    wrong.append(f"{case.name}, {place}: {name} counted {found}, planned {said}")
    assert not wrong, "\n".join(wrong)


# Counting a family takes up to half a minute: make test counts a dense one, and the modules alone.
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family == "llama" else pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_layers_of_every_family(family: str, quick: dict[str, Any]) -> None:
    compare(quick_cases_of(family), quick)


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_an_adapter_alone(case: Case, quick: dict[str, Any]) -> None:
    compare([case], quick)


@pytest.mark.slow
@pytest.mark.parametrize("case", DROPPED, ids=lambda case: case.name)
def test_dropout(case: Case, quick: dict[str, Any]) -> None:
    """A mask of booleans; on the CPU ``test_activations.py`` counts a wider one."""
    compare([case], quick)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_share_outer(case: Case, quick: dict[str, Any]) -> None:
    compare([case], quick)


@pytest.mark.slow
@pytest.mark.parametrize("case", WITH_DORA, ids=lambda case: case.name)
def test_dora(case: Case, quick: dict[str, Any]) -> None:
    compare([case], quick)


# 60 to 120 cases a family: every Megatron module alone, TP, EP and ETP, many rows, float32. What a
# family has of its own is in the quick cases of each.
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.slow if family == "llama" else pytest.mark.long)
        for family in FAMILIES
    ],
)
def test_adapters_on_every_module_and_every_layout(family: str) -> None:
    cases = list(cases_of(family))
    compare(cases, count(cases))


@pytest.mark.slow
def test_every_family_kind_and_level_is_counted(quick: dict[str, Any]) -> None:
    """A row of counts for each kind of layer that a registered family has, at each level of
    recomputation, with and without adapters, of layers through which backward goes."""
    rows = set()
    for family in FAMILIES:
        shape = model_shape(config_of(family))
        for case in quick_cases_of(family):
            for place, numbers in quick[case.name].items():
                # Layer 0 has the first adapter: its input needs no gradient.
                if not numbers["kept"] or place == "0":
                    continue
                kind = HEAD_KIND
                if place != "head":
                    kind = kind_of(shape, int(place))
                    # A frozen head makes its gradient in forward; a layer, in backward.
                    if not numbers["backward"]:
                        continue
                rows.add((family, kind, case.recompute, case.adapters))
    wanted = set()
    for family in FAMILIES:
        kinds = kinds_of(family)
        wanted |= set(itertools.product([family], kinds, LEVELS, (EVERYTHING, NOTHING)))
    assert rows == wanted


def test_a_planned_padding_is_the_kernels_own() -> None:
    """The planner repeats one number of the kernels, whose package needs torch."""
    # Room comes in steps of 16 columns: below, at and above one.
    for rank in (1, 8, 16, 17, 40):
        weight = AugmentedWeight(torch.zeros(2, 24, 48), rank)
        assert Augmented(rank).room == weight.room
