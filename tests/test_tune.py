"""The sweep that finds the fastest variants: which of them get a row of the table, and from how
many rows on torch's grouped GEMM is taken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megalora_kernels import tuned
from megalora_kernels.variants import Variant

from benchmarks.expert_case import Spec
from benchmarks.tune_points import (
    Operands,
    Point,
    groups,
    make_operands,
    mistake,
    reference,
    variant_label,
)
from benchmarks.tune_record import beats, vendor_from
from tests.made_up_sweep import (
    CPU,
    DOWN,
    DOWN_DGRAD,
    GATE_UP,
    GATE_UP_DGRAD,
    LAYERS,
    POINTS,
    RULE,
    VARIANTS,
    Bench,
    costs,
    place_for_a_table,
    rows_of,
    sweep,
    variants_of,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def out(tmp_path, monkeypatch):
    yield from place_for_a_table(tmp_path, monkeypatch)


def test_the_fastest_gets_the_row_of_every_point(out):
    found = sweep(out, Bench(costs(v0=100, v3=80, v5=70)))
    assert len(found["rows"]) == 4 and not found["rule_stands"]
    for row, point in zip(found["rows"], POINTS, strict=True):
        assert Variant(**row["variant"]) == VARIANTS[5]
        # Rows are for a padded rank: down's 4 and gate and up's 8 together are both padded to 16.
        assert (row["op"], row["R"]) == ("forward", 16)
        assert (row["N"], row["K"]) == (point.gemm.N, point.gemm.K)
        assert (row["rows_per_expert"], row["blocks"]) == (point.rows, len(point.gemm.ranks))
        # The made-up clock has a noise of 0.1 %.
        assert row["us"] == pytest.approx(70, rel=0.01)
        assert row["rule_us"] == pytest.approx(100, rel=0.01)
        assert 0 < row["spread"] < 0.01


def call_float32_bfloat16(monkeypatch) -> None:
    """The table has rows for half precision alone, and these sweeps compute in float32."""
    names = {torch.float32: "bfloat16"}
    monkeypatch.setattr("benchmarks.tune_record.DTYPE_NAMES", names)
    monkeypatch.setattr("benchmarks.tune_sweep.DTYPE_NAMES", names)


def test_the_written_file_drives_the_choice(out, monkeypatch):
    """Cost depends on the point here: where the rule is the best, it stands, beside rows of both
    neighbours."""
    points = [Point(GATE_UP, 2, rows) for rows in (64, 128, 256)]
    now = points[0]

    def cost(variant: Variant) -> float:
        if variant == RULE:
            return 100.0
        if variant == VARIANTS[4]:
            return 150.0 if now.rows == 128 else 50.0
        return 200.0

    bench = Bench(cost)
    timed = bench.timer

    def timer(calls, repeats):
        nonlocal now
        # Ten times for each point: six variants in round one, and the best four in round two, of
        # which the rule's is one here.
        now = points[len(bench.timed) // 10]
        return timed(calls, repeats)

    bench.timer = timer
    call_float32_bfloat16(monkeypatch)
    found = sweep(out, bench, points)
    assert rows_of(found) == [64, 256]
    assert rows_of(found, "rule_stands") == [128]
    # The weight is narrower than a tile that TMA loads: the reader must say so, not the launch.
    monkeypatch.setenv(tuned.ENV_TABLE, str(out))
    tuned.forget()
    with pytest.raises(
        ValueError, match=r"rows\[0\].*cannot run: TMA needs whole tiles.*tune again"
    ):
        tuned.choose(GATE_UP.product(torch.bfloat16, 64), CPU)


def test_a_row_that_can_run_is_chosen(out, monkeypatch):
    fast = VARIANTS[2]
    call_float32_bfloat16(monkeypatch)
    sweep(out, Bench(costs(v0=100, v2=50)), [Point(GATE_UP, 2, 128)])
    monkeypatch.setenv(tuned.ENV_TABLE, str(out))
    tuned.forget()
    product = GATE_UP.product(torch.bfloat16, 128)
    assert tuned.choose(product, CPU) == fast
    # A row holds for its bucket and the next one, where nothing nearer was measured...
    assert tuned.choose(replace(product, rows_per_expert=256), CPU) == fast
    # ... not further, and for no other product.
    assert tuned.choose(replace(product, rows_per_expert=512), CPU) != fast
    assert tuned.choose(DOWN.product(torch.bfloat16, 128), CPU) != fast


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.05])
def test_noise_writes_no_row(out, noise):
    """All variants are alike: whichever is ahead at a point is so by chance."""
    points = []
    for rows in tuned.BUCKETS[:6]:
        for gemm in (GATE_UP, DOWN, DOWN_DGRAD, GATE_UP_DGRAD):
            points.append(Point(gemm, 2, rows))
    found = sweep(out, Bench(lambda v: 100.0, noise), points)
    assert not found["rows"] and len(found["rule_stands"]) == 24


def test_one_per_cent_is_no_row_and_three_are_where_it_is_quiet(out):
    assert not sweep(out, Bench(costs(v0=100, v2=99)))["rows"]
    out.unlink()
    assert len(sweep(out, Bench(costs(v0=100, v2=97)))["rows"]) == 4
    out.unlink()
    # The same three beside noise of three per cent.
    assert not sweep(out, Bench(costs(v0=100, v2=97), noise=0.03))["rows"]


def test_the_noisier_of_the_two_counts(out):
    """A quiet variant beside a rule's that swings by a tenth."""
    bench = Bench(costs(v0=100, v2=90))
    timed = bench.timer

    def timer(calls, repeats):
        found = timed(calls, repeats)
        label = variant_label(RULE)
        # A tenth more and a tenth less in turns, so that the median stays.
        for i in range(len(found[label])):
            found[label][i] *= 0.9 if i % 2 else 1.1
        return found

    bench.timer = timer
    assert not sweep(out, bench)["rows"]


@pytest.mark.parametrize(
    ("us", "rule_us", "spread", "worth"),
    [
        # A gain must exceed 2 %, and twice the spread.
        (90, 100, 0.01, True),
        (97, 100, 0.02, False),
        (97.9, 100, 0, True),
        (98.1, 100, 0, False),
        (79, 100, 0.1, True),
        (81, 100, 0.1, False),
    ],
)
def test_what_beats_the_rule(us, rule_us, spread, worth):
    assert beats(us, rule_us, spread) == worth


def test_round_two_has_the_best_four_and_the_rule(out):
    """The rule's own is the slowest of six, and still timed to the end: its time is the
    yardstick."""
    bench = Bench(costs(v0=300, v1=250, v2=40, v3=30, v4=50, v5=60))
    row = sweep(out, bench, POINTS[:1])["rows"][0]
    assert Variant(**row["variant"]) == VARIANTS[3]
    assert row["rule_us"] == pytest.approx(300, rel=0.01)
    # Round one takes 3 repeats of each, round two 20.
    labels: dict[int, set[str]] = {3: set(), 20: set()}
    for label, repeats in bench.timed:
        labels[repeats].add(label)
    every = {variant_label(variant) for variant in VARIANTS}
    assert labels[3] == every
    # The second slowest is the one that is left out.
    assert labels[20] == every - {variant_label(VARIANTS[1])}


def test_a_lucky_time_of_round_one_gives_no_row(out):
    """Three lucky repeats put a variant into the second round; there it is what it is."""
    bench = Bench(costs(v0=100, v2=50))
    timed = bench.timer

    def timer(calls, repeats):
        found = timed(calls, repeats)
        if repeats == 3:
            found[variant_label(VARIANTS[1])] = [10.0] * 3
        return found

    bench.timer = timer
    assert variants_of(sweep(out, bench)) == [VARIANTS[2]] * 4


def test_order_of_points_and_what_their_buckets_are():
    """What matters most first; 30B before 235B; every bucket once for each GEMM, as the table has
    one row for each."""
    first, rest, big = groups()
    products = ("gate_up forward", "down forward", "down dgrad", "gate_up dgrad")
    expected = []
    # 8192 tokens of top 8 on one rank, then on one of 8 ranks.
    for experts, rows in ((128, 512), (16, 4096)):
        for name in products:
            expected.append((f"30b {name}", experts, rows))
    assert [(p.gemm.name, p.experts, p.rows) for p in first.points] == expected
    for points in ((*first.points, *rest.points), big.points):
        keys = [(point.gemm, tuned.bucket_of(point.rows)) for point in points]
        assert len(keys) == len(set(keys)) == 4 * len(tuned.BUCKETS)
        for point in points:
            assert point.experts in (128, 16) and point.rows in tuned.BUCKETS
    sizes = {}
    for point in rest.points:
        gemm = point.gemm
        sizes[gemm.name] = (gemm.op, gemm.N, gemm.K, gemm.ranks, gemm.gathered)
    # op, N, K, ranks of the blocks of B, and whether rows of x are gathered. gate_up has two
    # adapters, whose A's are one matrix in the gradient of its input.
    assert sizes == {
        "30b gate_up forward": ("forward", 1536, 2048, (16, 16), True),
        "30b down forward": ("forward", 2048, 768, (16,), False),
        "30b down dgrad": ("dgrad", 768, 2048, (16,), True),
        "30b gate_up dgrad": ("dgrad", 2048, 1536, (32,), False),
    }
    rows = [spec.num_rows // spec.experts for spec in (*first.layers, *rest.layers)]
    assert rows == sorted(rows, reverse=True) == [4096, 2048, 1024, 512, 256, 128]


@pytest.mark.parametrize(
    # Rows per expert -> microseconds of a layer by Triton and by torch. Torch must be the faster
    # from there on upwards, without a gap.
    ("us", "expected"),
    [
        ({256: (100, 80), 128: (100, 90), 64: (100, 120)}, 128),
        ({256: (100, 80), 128: (100, 90), 64: (100, 90)}, 64),
        ({256: (100, 120), 128: (100, 90), 64: (100, 90)}, None),
        # One per cent is noise; None: it could not run.
        ({256: (100, 80), 128: (100, 99), 64: (100, 90)}, 256),
        ({256: (100, 80), 128: (100, None), 64: (100, 90)}, 256),
        ({256: (None, 80), 128: (100, 90), 64: (100, 90)}, None),
    ],
)
def test_from_where_on_torchs_grouped_gemm_is_taken(out, us, expected):
    bench = Bench(costs(v0=100))
    bench.layer_us = us
    found = sweep(out, bench, POINTS[:1], layers=LAYERS)
    key = {"dtype": "float32", "hidden": 32, "intermediate": 16, "R": 16}
    assert found["layers"] == [{**key, "vendor_from": expected}]
    # Never is what a launch reads where none was found; ranks up to 16 are one bucket.
    from_rows = float("inf") if expected is None else expected
    for rank in (4, 8, 16):
        assert tuned.choices_for("cpu").vendor_from(torch.float32, 32, 16, rank) == from_rows


def test_layers_are_timed_with_the_rows_found_so_far(out):
    """What a launch asks for in the layer, though it was asked before the sweep, with no table."""
    assert not tuned.choices_for("cpu").table.variants
    bench = Bench(costs(v0=100, v1=50))
    # Layers of all three sizes, whose times do not matter.
    bench.layer_us = dict.fromkeys((256, 128, 64), (100.0, 90.0))
    seen = []
    time_layer = bench.layer

    def layer(spec: Spec) -> dict[str, Any]:
        seen.append(set(tuned.choices_for("cpu").table.variants.values()))
        return time_layer(spec)

    bench.layer = layer
    sweep(out, bench, layers=LAYERS)
    assert seen == [{VARIANTS[1]}] * 3


def test_a_layer_without_points_is_no_crossing():
    assert vendor_from([]) is None


@pytest.mark.parametrize(
    "gemm", [GATE_UP, DOWN, DOWN_DGRAD, GATE_UP_DGRAD], ids=lambda gemm: gemm.name
)
def test_the_reference_and_the_launch_agree(gemm):
    """The product's own loop over experts, and the operands that training would give it."""
    from megalora_kernels.grouped_gemm import grouped_gemm_loop

    def by_the_loop(o: Operands, variant: Variant) -> torch.Tensor:
        return grouped_gemm_loop(o.x, o.w_EKN, o.routing, o.s_MR, o.b, o.source_M)

    # Uneven experts, and one without rows.
    o = make_operands(gemm, (3, 0, 7, 1), CPU, torch.float32)
    assert mistake(o, reference(o), RULE, by_the_loop) is None
    # Forward reads the weight [N, K] as it is stored, transposed; its gradient reads it the other
    # way.
    assert (o.w_EKN.stride(1) == 1) == (gemm.op == "forward")
    assert (o.source_M is not None) == gemm.gathered
