"""Check what a plan says of saving Qwen3-30B-A3B by sums made by hand; bytes of real snapshots are
compared in ``test_memory.py``."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import LoRAConfig, ParallelConfig
from megalora.planner.layouts import ParallelLayout
from megalora.planner.models import load_shape
from megalora.planner.save_bytes import save_plan
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

MODELS = Path(__file__).parents[2] / "configs" / "models"
WORK = Workload(sequence_length=4096, global_batch_size=64)
# Rank 16 on all linears of 48 layers: 128 experts, each 16 (2048 + 768) three times, and attention.
EXPERTS = 48 * 128 * 3 * 16 * (2048 + 768)
ATTENTION = 48 * 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))


@pytest.fixture(scope="module")
def model() -> PlannedModel:
    lora = LoRAConfig(rank=16, alpha=32.0)
    return PlannedModel.of(load_shape(MODELS / "qwen3_30b_a3b.yaml"), lora)


def test_30b_on_eight_gpus(model: PlannedModel) -> None:
    """Experts are one rank's own, attention is shared out: an eighth of everything."""
    layout = ParallelLayout(parallel=ParallelConfig(ep=8), num_ranks=8)
    plan = save_plan(model, layout, WORK)
    own = (EXPERTS + ATTENTION) // 8
    # Generators: the CPU's, and four of a GPU.
    assert plan.buffer_bytes == 12 * own + 5056 + 4 * 16
    # 1.27 GB each, page-locked in powers of two.
    assert plan.host_bytes == 2 * 2**31
    assert plan.disk_bytes == 14 * (EXPERTS + ATTENTION)
    # 11.8 GB at 1 GB/s; 1.27 GB at 25 GB/s.
    assert plan.disk_s == pytest.approx(11.8, abs=0.05)
    assert plan.copy_s == pytest.approx(0.051, abs=0.001)
    assert "4.295 GB, 2 snapshots of 1.266 GB" in plan.line()


def test_what_is_kept_beside_the_adapter(model: PlannedModel) -> None:
    """A float32 average in the state, and its file of the adapter's form; the start in bfloat16."""
    layout = ParallelLayout(parallel=ParallelConfig(ep=8), num_ranks=8)
    plain = save_plan(model, layout, WORK)
    beside = save_plan(model, layout, replace(WORK, averaged=True, holds_start=True))
    own = (EXPERTS + ATTENTION) // 8
    assert beside.buffer_bytes - plain.buffer_bytes == (4 + 2) * own
    assert beside.disk_bytes - plain.disk_bytes == (4 + 2 + 2) * (EXPERTS + ATTENTION)


def test_stages_have_their_own(model: PlannedModel) -> None:
    """Half of the layers, with nothing shared out; on the CPU memory is as large as asked for."""
    layout = ParallelLayout(parallel=ParallelConfig(pp=2), num_ranks=2)
    work = Workload(sequence_length=4096, global_batch_size=64, on_cpu=True)
    plan = save_plan(model, layout, work)
    assert plan.buffer_bytes == 6 * (EXPERTS + ATTENTION) + 4 * 5056
    assert plan.host_bytes == 2 * plan.buffer_bytes


def test_snapshots_in_memory(model: PlannedModel) -> None:
    """One buffer more, page-locked in powers of two, and two slots of what a rank owns."""
    layout = ParallelLayout(parallel=ParallelConfig(ep=8), num_ranks=8)
    plan = save_plan(model, layout, replace(WORK, has_snapshots=True))
    own = 12 * (EXPERTS + ATTENTION) // 8 + 5056 + 4 * 16
    assert plan.memory_bytes == 2**31 + 2 * own
    assert plan.host_bytes == 2 * 2**31
    assert "checkpoint.snapshots takes 4.679 GB more" in plan.line()
    # Two slots more for replicas under way, and two for those of a rank of the node before.
    replicated = save_plan(model, layout, replace(WORK, has_snapshots=True, has_replicas=True))
    assert replicated.memory_bytes == 2**31 + 6 * own
    assert "and 6 slots of the launcher" in replicated.line()
    assert "snapshots takes" not in save_plan(model, layout, WORK).line()
