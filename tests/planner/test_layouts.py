"""Compare the enumeration of layouts with brute force over every combination of sizes, and check
the reasons for what is left out."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from megalora.config import ParallelConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.planner.divisions import MOST_CHUNKS
from megalora.planner.layouts import LEVELS, ParallelLayout, check, enumerate_layouts
from megalora.planner.models import load_shape
from megalora.planner.workload import Workload

ROOT = Path(__file__).parents[2]
WORK = Workload(sequence_length=4096, global_batch_size=64)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return load_shape(ROOT / "configs" / "models" / "qwen3_30b_a3b.yaml")


def test_planning_does_not_import_torch() -> None:
    # A process of its own: this one has imported torch. It exits with 0 where the two sets have
    # nothing in common.
    code = (
        "import sys, megalora.planner.layouts, megalora.planner.memory, megalora.planner.dryrun,"
        " megalora.planner.models; "
        "sys.exit(len({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def sizes_of(layout: ParallelLayout) -> tuple[int, ...]:
    """tp, cp, pp, vpp, ep, etp and the size of a microbatch."""
    p = layout.parallel
    return p.tp, p.cp, p.pp, p.vpp, p.ep, p.etp, layout.micro_batch_size


def tp_divides(shape: ModelShape, tp: int) -> bool:
    """Whether TP can split attention, vocabulary and MLPs."""
    # Fewer key/value heads than ranks are replicated.
    kv_heads = shape.num_kv_heads % tp == 0 or tp % shape.num_kv_heads == 0
    has_dense = len(shape.moe_layers) < shape.num_layers
    dense = not has_dense or shape.intermediate % tp == 0
    # Zero without a shared expert, which every size divides.
    shared = shape.shared_intermediate % tp == 0
    return shape.num_heads % tp == 0 and kv_heads and dense and shared and shape.vocab % tp == 0


def experts_divide(shape: ModelShape, ep: int, etp: int) -> bool:
    """Whether EP can share the experts out, and ETP split each."""
    return shape.num_experts % ep == 0 and shape.expert_intermediate % etp == 0


def stages_divide(num_layers: int, pp: int, vpp: int) -> bool:
    """Whether parts are equal, or embedding and head make them so; stages of one chunk may be of
    any size."""
    parts = pp * vpp
    if num_layers % parts == 0 and vpp <= MOST_CHUNKS:
        return True
    if parts > num_layers or vpp > MOST_CHUNKS:
        return False
    return vpp == 1 or (num_layers + 2) % parts == 0


def by_force(
    shape: ModelShape, num_ranks: int, work: Workload, micros: tuple[int, ...]
) -> set[tuple]:
    """Sizes up to the number of ranks and chunks up to the number of layers, kept where the model
    divides and batches do."""
    sizes = range(1, num_ranks + 1)
    found = set()
    for tp, cp, pp, ep, etp in itertools.product(sizes, repeat=5):
        # Attention's grid and the experts' grid must both fill the ranks.
        if num_ranks % (tp * cp * pp) or num_ranks % (ep * etp * pp):
            continue
        # At least 4,096 tokens of a sample on each rank.
        if cp > 1 and work.sequence_length / cp < 4096:
            continue
        if not (tp_divides(shape, tp) and experts_divide(shape, ep, etp)):
            continue
        dp = num_ranks // (tp * cp * pp)
        for vpp, micro in itertools.product(range(1, shape.num_layers + 1), micros):
            # One stage has nothing to interleave.
            if (vpp > 1 and pp == 1) or not stages_divide(shape.num_layers, pp, vpp):
                continue
            if work.global_batch_size % (micro * dp):
                continue
            # Megatron's interleaved schedule takes microbatches in rounds of pp.
            if vpp == 1 or work.global_batch_size // (micro * dp) % pp == 0:
                found.add((tp, cp, pp, vpp, ep, etp, micro))
    return found


# 6 and 12 have factors that the model's powers of two do not.
@pytest.mark.parametrize("num_ranks", [1, 6, 8, 12])
@pytest.mark.parametrize("batch", [8, 24])
def test_legal_is_what_divides(num_ranks: int, batch: int, shape: ModelShape) -> None:
    work = Workload(sequence_length=128, global_batch_size=batch)
    found = enumerate_layouts(shape, num_ranks, work, micro_batch_sizes=(1, 2), recompute=("off",))
    ours = [sizes_of(layout) for layout in found.legal]
    # No layout twice.
    assert len(ours) == len(set(ours))
    assert set(ours) == by_force(shape, num_ranks, work, (1, 2))


def test_legal_where_no_power_of_two_divides_the_layers() -> None:
    """94 layers: four and eight stages of unequal size, in as many chunks as embedding and head
    make equal."""
    large = load_shape(ROOT / "configs" / "models" / "qwen3_235b_a22b.yaml")
    work = Workload(sequence_length=128, global_batch_size=16)
    found = enumerate_layouts(large, 8, work, micro_batch_sizes=(1,), recompute=("off",))
    ours = [sizes_of(layout) for layout in found.legal]
    assert len(ours) == len(set(ours))
    assert set(ours) == by_force(large, 8, work, (1,))
    stages = {}
    for layout in found.legal:
        p = layout.parallel
        stages[p.pp, p.vpp] = p.stage_layers
        check(large, layout, work)
    assert stages[2, 1] is None and stages[4, 1] == (23, 24, 24, 23)
    assert stages[2, 4] == (11, *[12] * 6, 11) and stages[8, 2] == (5, *[6] * 14, 5)
    assert (2, 47) not in stages


def test_legal_where_rows_are_cut(shape: ModelShape) -> None:
    """Three ranks of four parts would have too few tokens of 16,000: two are tried, four not."""
    work = Workload(sequence_length=16000, global_batch_size=8)
    found = enumerate_layouts(shape, 8, work, micro_batch_sizes=(1,), recompute=("off",))
    ours = [sizes_of(layout) for layout in found.legal]
    assert len(ours) == len(set(ours))
    assert set(ours) == by_force(shape, 8, work, (1,))
    assert {layout.parallel.cp for layout in found.legal} == {1, 2}


def test_legal_of_a_model_with_everything(everything: Path) -> None:
    # It has dense layers and a shared expert, whose widths limit TP as well.
    small = model_shape(read_hf_config(everything))
    work = Workload(sequence_length=64, global_batch_size=12)
    found = enumerate_layouts(small, 12, work, micro_batch_sizes=(1, 3), recompute=("off",))
    ours = {sizes_of(layout) for layout in found.legal}
    assert ours == by_force(small, 12, work, (1, 3))


def test_layouts_of_256_ranks(shape: ModelShape) -> None:
    found = enumerate_layouts(shape, 256, WORK)
    assert len(found.legal) > 1000
    assert {layout.recompute for layout in found.legal} == set(LEVELS)
    # Fifty of them, for each is checked against the config's own rules.
    for layout in found.legal[:: len(found.legal) // 50]:
        check(shape, layout, WORK)


@pytest.mark.parametrize(
    "num_ranks", [720_720, 2**20, 1_048_573], ids=["240 divisors", "largest", "prime"]
)
def test_absurd_numbers_of_ranks_are_answered_at_once(num_ranks: int, shape: ModelShape) -> None:
    found = enumerate_layouts(shape, num_ranks, WORK)
    # 240 divisors for each of five sizes would be 8e11 combinations to look at.
    assert not found.legal
    assert len(found.rejected) < 100_000


# One layout for each rule, all of 512 ranks; micro is given where the rule is one of batches.
@pytest.mark.parametrize(
    ("parallel", "micro", "reason"),
    [
        (
            {"tp": 64},
            None,
            "parallel.tp=64 does not fit the model's 32 attention heads and 4 key/value heads",
        ),
        ({"pp": 64}, None, "parallel.pp * vpp=64 does not divide the model's 48 layers"),
        ({"ep": 256}, None, "parallel.ep=256 does not divide the model's 128 experts"),
        ({"cp": 4}, None, "parallel.cp=4 leaves a rank 1,024 tokens of a sample of 4,096"),
        (
            {"ep": 1, "etp": 512},
            None,
            "parallel.etp=512 does not divide the model's 768 features per expert",
        ),
        (
            {"tp": 1},
            4,
            "train.global_batch_size=64 cannot be divided: micro_batch_size=4 * data parallel=512",
        ),
        (
            {"tp": 32, "pp": 8, "vpp": 2},
            8,
            "the interleaved schedule (parallel.vpp=2) needs a number of microbatches",
        ),
    ],
)
def test_every_rejected_layout_has_its_reason(
    parallel: dict, micro: int | None, reason: str, shape: ModelShape
) -> None:
    p = ParallelConfig(**parallel)
    found = enumerate_layouts(shape, 512, WORK)
    reasons = []
    for rejected in found.rejected:
        assert rejected.reason
        assert "\n" not in rejected.reason
        if (rejected.parallel, rejected.micro_batch_size) == (p, micro):
            reasons.append(rejected.reason)
    assert len(reasons) == 1 and reason in reasons[0], reasons
    for legal in found.legal:
        # None stands for every size of a microbatch.
        assert not (legal.parallel == p and micro in (None, legal.micro_batch_size))
    # A user who asks for it is told the same; short parts are not tried, but legal.
    if p.cp > 1:
        return
    layout = ParallelLayout(parallel=p, num_ranks=512, micro_batch_size=micro or 1)
    with pytest.raises(ValueError, match=r"tp=.*micro=") as error:
        check(shape, layout, WORK)
    assert reasons[0] in str(error.value) and "\n" not in str(error.value)


def test_a_sample_shorter_than_the_parts_of_a_row(shape: ModelShape) -> None:
    work = Workload(sequence_length=15, global_batch_size=8)
    layout = ParallelLayout(parallel=ParallelConfig(tp=2, cp=4), num_ranks=8)
    with pytest.raises(ValueError, match=r"tp=2 and parallel\.cp=4 cut a row into 16 parts"):
        check(shape, layout, work)
    check(shape, layout, Workload(sequence_length=16, global_batch_size=8))


def test_experts_of_a_dense_model_are_not_divided(tiny_dense: Path) -> None:
    dense = model_shape(read_hf_config(tiny_dense))
    found = enumerate_layouts(dense, 4, Workload(sequence_length=64, global_batch_size=8))
    tps = set()
    for layout in found.legal:
        assert (layout.parallel.ep, layout.parallel.etp) == (1, 1)
        tps.add(layout.parallel.tp)
    # Its 6 heads are not divisible by 4.
    assert tps == {1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranks": 0}, "at least 1 rank, got 0"),
        ({"num_ranks": 10**9}, "1,000,000,000 ranks: the planner lays out up to 1,048,576"),
        ({"micro_batch_sizes": (0,)}, "a microbatch has at least 1 sample; sizes to try: .0."),
        ({"micro_batch_sizes": ()}, "a microbatch has at least 1 sample; sizes to try: .]"),
        ({"recompute": ("some",)}, "recompute levels are off, selective, full; got"),
    ],
)
def test_choices_that_are_none(options: dict, message: str, shape: ModelShape) -> None:
    with pytest.raises(ValueError, match=message):
        enumerate_layouts(shape, **{"num_ranks": 8, "work": WORK, **options})


@pytest.mark.parametrize(
    "options", [{"sequence_length": 1}, {"global_batch_size": 0}, {"imbalance": 0.5}]
)
def test_workloads_that_are_none(options: dict) -> None:
    with pytest.raises(ValueError, match="at least"):
        Workload(**{"sequence_length": 8, "global_batch_size": 8, **options})


def test_a_layout_that_does_not_fill_the_world() -> None:
    with pytest.raises(ValueError, match="12 ranks cannot hold the expert grid"):
        ParallelLayout(parallel=ParallelConfig(ep=8), num_ranks=12)
