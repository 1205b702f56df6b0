"""The sweep that finds the fastest variants, with a clock and kernels that are made up: what it
writes, and what it refuses.

Sizes are small; what decides is the made-up time of each variant, in microseconds, and the noise on
it.
"""

import json
import random
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megalora_kernels import tuned
from megalora_kernels.variants import Variant

from benchmarks import tune, tune_compile
from benchmarks.expert_case import Sizes, Spec
from benchmarks.tune_compile import Job, compile_all
from benchmarks.tune_points import (
    Group,
    Operands,
    Point,
    gemms_of,
    groups,
    make_operands,
    mistake,
    reference,
    variant_label,
)
from benchmarks.tune_record import Record, beats, vendor_from
from benchmarks.tune_sweep import DeadDevice, Sweep, Tools
from tests.waiting import time_is_up_when

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SIZES = Sizes("tiny", 32, 16, num_experts=4, top_k=2)
GATE_UP, DOWN, DOWN_DGRAD, GATE_UP_DGRAD = gemms_of(SIZES, rank=4)
RULE = Variant(64, 128, 64, 4, 4)
OTHERS = [Variant(64, 128, 64, 4, 3), Variant(128, 128, 64, 8, 3), Variant(128, 128, 64, 8, 4)]
OTHERS += [Variant(128, 256, 64, 8, stages, weight="tma") for stages in (3, 4)]
VARIANTS = [RULE, *OTHERS]
POINTS = tuple(Point(gemm, 2, rows) for rows in (64, 128) for gemm in (GATE_UP, DOWN))
LAYERS = tuple(Spec(SIZES, rows * 2, 4, 4, "balanced") for rows in (256, 128, 64))


def by_torch(o: Operands, variant: Variant) -> torch.Tensor:
    """What every right variant computes; allocated as the launcher does."""
    y_MN = o.x.new_empty(o.routing.num_rows, o.w_EKN.shape[2])
    return y_MN.copy_(reference(o))


class Bench:
    """A made-up machine: variants take ``cost(variant, call number)`` microseconds, and time passes
    only by them."""

    def __init__(
        self, cost: Callable[[Variant], float], noise: float = 0.001, run: Any = by_torch
    ) -> None:
        self.cost = cost
        self.noise = noise
        self.run = run
        self.seconds, self.random = 0.0, random.Random(0)
        self.compiled: list[Job] = []
        self.timed: list[tuple[str, int]] = []
        self.no_compile: dict[Variant, str] = {}
        self.too_slow: set[Variant] = set()
        """Variants that the compiler never reaches."""
        self.reach = 10**6
        """How many jobs of a call it reaches."""
        self.alive = True
        self.layer_us: dict[int, tuple[float | None, float | None]] = {}

    def timer(self, calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        by_label = {variant_label(v): v for v in VARIANTS}
        found = {}
        for label in calls:
            self.timed.append((label, repeats))
            us = self.cost(by_label[label])
            found[label] = [us * (1 + self.random.gauss(0, self.noise)) for _ in range(repeats)]
            self.seconds += 0.01 * repeats
        return found

    def compiler(self, jobs: Sequence[Job], seconds: float) -> dict[Job, str | None]:
        self.compiled += jobs
        self.seconds += 1
        reached = [job for job in jobs[: self.reach] if job.variant not in self.too_slow]
        return {job: self.no_compile.get(job.variant) for job in reached}

    def layer(self, spec: Spec) -> dict[str, Any]:
        triton, vendor = self.layer_us[spec.num_rows // spec.experts]
        self.seconds += 1
        return {"triton_us": triton, "grouped_mm_us": vendor, "spread": 0.01, "problems": []}

    def tools(self, **changed: Any) -> Tools:
        how = dict(
            device=CPU, dtype=torch.float32, timer=self.timer, compiler=self.compiler,
            layer=self.layer, uneven=(0, 1, 5, 2),
            run=self.run, alive=lambda: self.alive, now=lambda: self.seconds,
            variants=lambda *_: VARIANTS,
        )  # fmt: skip
        return Tools(**{**how, **changed})


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(tuned.ENV_TABLE, "off")  # and put back what the sweep sets
    tuned.forget()
    # asking git at every save takes seconds in all
    monkeypatch.setattr("benchmarks.gpu_timing.commit", lambda: "abc")
    yield tmp_path / "tuned.json"
    tuned.forget()


def sweep(
    out: Path,
    bench: Bench,
    points: Sequence[Point] = POINTS,
    seconds: float = 1e6,
    layers: Any = (),
) -> dict[str, Any]:
    Sweep(Record(out, CPU, dry=True), bench.tools(), seconds).measure(
        [Group(tuple(points), tuple(layers))]
    )
    return json.loads(out.read_text())


def costs(**by_stage: float) -> Callable[[Variant], float]:
    """Microseconds by position in VARIANTS: v0 is the rule's own; the others 200."""
    return lambda v: by_stage.get(f"v{VARIANTS.index(v)}", 200.0)


# ---- rows ----------------------------------------------------------------------------------------


def test_the_fastest_gets_the_row_of_every_point(out):
    found = sweep(out, Bench(costs(v0=100, v3=80, v5=70)))
    assert len(found["rows"]) == 4 and not found["rule_stands"]
    for row, point in zip(found["rows"], POINTS, strict=True):
        assert Variant(**row["variant"]) == VARIANTS[5]
        assert (row["op"], row["N"], row["K"], row["R"]) == (
            "forward",
            point.gemm.N,
            point.gemm.K,
            16,
        )
        assert (row["rows_per_expert"], row["blocks"]) == (point.rows, len(point.gemm.ranks))
        assert row["us"] == pytest.approx(70, rel=0.01) and row["rule_us"] == pytest.approx(
            100, rel=0.01
        )
        assert 0 < row["spread"] < 0.01


def test_the_written_file_drives_the_choice(out, monkeypatch):
    """Cost depends on the point here: where the rule is the best, it stands, beside rows of both
    neighbours."""
    points = tuple(Point(GATE_UP, 2, rows) for rows in (64, 128, 256))
    now: list[Point] = []
    bench = Bench(
        lambda v: {RULE: 100, VARIANTS[4]: 150 if now[-1].rows == 128 else 50}.get(v, 200.0)
    )
    timed = bench.timer
    bench.timer = lambda calls, repeats: (
        now.append(points[len(bench.timed) // 10]),
        timed(calls, repeats),
    )[1]
    monkeypatch.setattr(
        "benchmarks.tune_record.DTYPE_NAMES", {torch.float32: "bfloat16"}
    )  # variants for half precision
    monkeypatch.setattr("benchmarks.tune_sweep.DTYPE_NAMES", {torch.float32: "bfloat16"})
    found = sweep(out, bench, points)
    assert [row["rows_per_expert"] for row in found["rows"]] == [64, 256]
    assert [row["rows_per_expert"] for row in found["rule_stands"]] == [128]
    # The weight is narrower than a tile that TMA loads: the reader must say so, not the launch.
    monkeypatch.setenv(tuned.ENV_TABLE, str(out))
    tuned.forget()
    with pytest.raises(
        ValueError, match=r"rows\[0\].*cannot run: TMA needs whole tiles.*tune again"
    ):
        tuned.choose(GATE_UP.product(torch.bfloat16, 64), CPU)


def test_a_row_that_can_run_is_chosen(out, monkeypatch):
    fast = VARIANTS[2]
    monkeypatch.setattr("benchmarks.tune_record.DTYPE_NAMES", {torch.float32: "bfloat16"})
    monkeypatch.setattr("benchmarks.tune_sweep.DTYPE_NAMES", {torch.float32: "bfloat16"})
    sweep(out, Bench(costs(v0=100, v2=50)), [Point(GATE_UP, 2, 128)])
    monkeypatch.setenv(tuned.ENV_TABLE, str(out))
    tuned.forget()
    product = GATE_UP.product(torch.bfloat16, 128)
    assert (
        tuned.choose(product, CPU)
        == fast
        == tuned.choose(replace(product, rows_per_expert=256), CPU)
    )
    assert tuned.choose(replace(product, rows_per_expert=512), CPU) != fast
    assert tuned.choose(DOWN.product(torch.bfloat16, 128), CPU) != fast


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.05])
def test_noise_writes_no_row(out, noise):
    points = [
        Point(gemm, 2, rows)
        for rows in tuned.BUCKETS[:6]
        for gemm in (GATE_UP, DOWN, DOWN_DGRAD, GATE_UP_DGRAD)
    ]
    found = sweep(out, Bench(lambda v: 100.0, noise), points)
    assert not found["rows"] and len(found["rule_stands"]) == 24


def test_one_per_cent_is_no_row_and_three_are_where_it_is_quiet(out):
    assert not sweep(out, Bench(costs(v0=100, v2=99)))["rows"]
    out.unlink()
    assert len(sweep(out, Bench(costs(v0=100, v2=97)))["rows"]) == 4
    out.unlink()
    assert not sweep(out, Bench(costs(v0=100, v2=97), noise=0.03))["rows"]


def test_the_noisier_of_the_two_counts(out):
    """A quiet variant beside a rule's that swings by a tenth."""
    bench = Bench(costs(v0=100, v2=90))
    timed = bench.timer

    def timer(calls, repeats):
        found = timed(calls, repeats)
        label = variant_label(RULE)
        found[label] = [us * (0.9 if i % 2 else 1.1) for i, us in enumerate(found[label])]
        return found

    bench.timer = timer
    assert not sweep(out, bench)["rows"]


@pytest.mark.parametrize(
    ("us", "rule_us", "spread", "worth"),
    [
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
    assert Variant(**row["variant"]) == VARIANTS[3] and row["rule_us"] == pytest.approx(
        300, rel=0.01
    )
    first = {label for label, repeats in bench.timed if repeats == 3}
    second = {label for label, repeats in bench.timed if repeats == 20}
    assert first == {variant_label(v) for v in VARIANTS}
    assert second == {variant_label(VARIANTS[i]) for i in (0, 2, 3, 4, 5)}


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
    assert [Variant(**row["variant"]) for row in sweep(out, bench)["rows"]] == [VARIANTS[2]] * 4


# ---- variants that are refused -------------------------------------------------------------------


def with_bug(which: Variant, bug: Callable[[Operands, torch.Tensor], torch.Tensor | None]) -> Any:
    def run(o: Operands, variant: Variant) -> torch.Tensor:
        y_MN = by_torch(o, variant)
        if variant == which:
            changed = bug(o, y_MN)
            return y_MN if changed is None else changed
        return y_MN

    return run


def one_row_of_the_neighbours_expert(o: Operands, y_MN: torch.Tensor) -> None:
    y_MN[-1] = y_MN[0]


def unwritten(o: Operands, y_MN: torch.Tensor) -> torch.Tensor:
    """The last rows are never stored. Memory of the call before would hold the right ones by
    chance."""
    y = o.x.new_empty(y_MN.shape)
    if not y.isnan().all():
        return y_MN
    y[:-3] = y_MN[:-3]
    return y


def without_adapter(o: Operands, y_MN: torch.Tensor) -> torch.Tensor:
    return reference(replace(o, b=tuple(torch.zeros_like(b) for b in o.b)))


def blocks_swapped(o: Operands, y_MN: torch.Tensor) -> torch.Tensor:
    return reference(replace(o, b=o.b[::-1]))


def rows_not_gathered(o: Operands, y_MN: torch.Tensor) -> torch.Tensor:
    assert o.source_M is not None
    return reference(replace(o, source_M=o.source_M.roll(1)))


def other_bits(o: Operands, y_MN: torch.Tensor, calls: list[int] = []) -> torch.Tensor:  # noqa: B006 (counts calls)
    calls.append(0)
    return y_MN * (1 + 1e-6 * (len(calls) % 2))


WRONG = {
    f.__name__: f
    for f in (
        one_row_of_the_neighbours_expert,
        unwritten,
        without_adapter,
        blocks_swapped,
        rows_not_gathered,
        other_bits,
    )
}


@pytest.mark.parametrize("bug", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_variant_gets_no_row_though_it_is_the_fastest(out, bug):
    wrong = VARIANTS[2]
    bench = Bench(costs(v0=100, v2=1, v3=80), run=with_bug(wrong, bug))
    found = sweep(out, bench, [Point(GATE_UP, 2, 64)])
    assert [Variant(**row["variant"]) for row in found["rows"]] == [VARIANTS[3]]
    assert found["sweep"]["refused"].keys() == {f"tiny gate_up forward: {variant_label(wrong)}"}
    why = "wrong: other bits" if bug is other_bits else "wrong: "
    assert next(iter(found["sweep"]["refused"].values())).startswith(why)
    assert ("rows differ from float32" in str(found["sweep"]["refused"])) == (bug is not other_bits)
    assert variant_label(wrong) not in {label for label, _ in bench.timed}


def test_one_wrong_row_among_many_is_found():
    """In bfloat16, where the whole would differ by 0.4 %, less than rounding may."""
    o = make_operands(DOWN, (80_000,), CPU, torch.bfloat16)
    want_MN = reference(o)
    right_MN = want_MN.bfloat16()
    assert mistake(o, want_MN, RULE, lambda *_: right_MN) is None
    wrong_MN = right_MN.clone()
    wrong_MN[777] = right_MN[0]
    assert str(mistake(o, want_MN, RULE, lambda *_: wrong_MN)).startswith(
        "wrong: 1 of 80000 rows differ from float32"
    )


def test_a_variant_wrong_at_many_rows_alone_is_found_at_the_point(out):
    """Right on the few uneven experts, wrong with 128 rows each."""
    wrong = VARIANTS[2]

    def run(o: Operands, variant: Variant) -> torch.Tensor:
        y_MN = by_torch(o, variant)
        if variant == wrong and o.routing.num_rows == 256:
            y_MN[200, 3] += 1
        return y_MN

    found = sweep(
        out, Bench(costs(v0=100, v2=1), run=run), [Point(DOWN, 2, 64), Point(DOWN, 2, 128)]
    )
    assert [row["rows_per_expert"] for row in found["rows"]] == [64]
    assert (
        "1 of 256 rows differ"
        in found["sweep"]["refused"][f"tiny down forward: {variant_label(wrong)}"]
    )


def test_a_variant_that_raises_is_named_and_the_others_go_on(out):
    raises = VARIANTS[4]

    def run(o: Operands, variant: Variant) -> torch.Tensor:
        if variant == raises:
            raise RuntimeError("out of resource: shared memory\nand more")
        return by_torch(o, variant)

    found = sweep(out, Bench(costs(v0=100, v4=1, v3=80), run=run), POINTS[:1])
    reason = "does not run: RuntimeError: out of resource: shared memory"
    assert found["sweep"]["refused"] == {f"tiny gate_up forward: {variant_label(raises)}": reason}
    assert Variant(**found["rows"][0]["variant"]) == VARIANTS[3]


def test_a_dead_device_ends_the_process_and_the_next_goes_on_without_the_variant(out):
    kills = VARIANTS[4]
    bench = Bench(costs(v0=100, v4=1, v3=80))

    def run(o: Operands, variant: Variant) -> torch.Tensor:
        if variant == kills:
            bench.alive = False
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return by_torch(o, variant)

    bench.run = run
    for _ in range(2):  # once for each GEMM
        with pytest.raises(DeadDevice, match="illegal memory access"):
            sweep(out, bench)
        bench.alive = True  # a new process
    found = sweep(out, bench)
    assert len(found["rows"]) == 4 and len(found["sweep"]["refused"]) == 2
    assert {Variant(**row["variant"]) for row in found["rows"]} == {VARIANTS[3]}


def test_a_variant_that_took_the_process_down_is_refused_by_the_next(out):
    Record(out, CPU, dry=True).save()
    name = f"tiny gate_up forward: {variant_label(VARIANTS[3])}"
    out.with_suffix(".running").write_text(name)
    found = sweep(out, Bench(costs(v0=100, v3=1, v1=50)), POINTS[:1])
    assert found["sweep"]["refused"] == {name: "the process ended, or hung, while it ran"}
    assert Variant(**found["rows"][0]["variant"]) == VARIANTS[1]
    assert not out.with_suffix(".running").exists()


def test_a_point_that_fails_is_named_and_the_others_go_on(out):
    """The layer runs out of memory, and one GEMM has no variant that is right."""
    bench = Bench(costs(v0=100, v1=50))
    bench.layer_us = {256: (100, 80), 128: (100, 90)}  # of 64 rows it knows nothing: KeyError

    def run(o: Operands, variant: Variant) -> torch.Tensor:
        return by_torch(o, variant) * (2 if o.source_M is None else 1)

    bench.run = run
    found = sweep(out, bench, layers=LAYERS)
    assert [row["N"] for row in found["rows"]] == [GATE_UP.N] * 2 and len(
        found["sweep"]["crossing"]
    ) == 2
    failures = found["sweep"]["failures"]
    assert list(failures) == [
        "tiny down forward 2 x 64",
        "tiny down forward 2 x 128",
        LAYERS[2].label,
    ]
    assert (
        "no variant computes it" in failures["tiny down forward 2 x 64"]
        and failures[LAYERS[2].label] == "KeyError: 64"
    )


def test_a_device_that_dies_while_it_is_timed_does_not_die_of_the_same_point_again(out):
    bench = Bench(costs(v0=100, v1=50))
    timed = bench.timer

    def timer(calls, repeats):
        if repeats == 20 and len(bench.timed) < 8:
            bench.alive = False
            raise RuntimeError("CUDA error: unspecified launch failure")
        return timed(calls, repeats)

    bench.timer = timer
    with pytest.raises(DeadDevice, match="tiny gate_up forward 2 x 64"):
        sweep(out, bench)
    bench.alive = True
    found = sweep(out, bench)
    assert (
        list(found["sweep"]["failures"]) == ["tiny gate_up forward 2 x 64"]
        and len(found["rows"]) == 3
    )


def test_what_does_not_compile_is_refused_and_never_launched(out):
    bench = Bench(costs(v0=100, v5=1, v2=50))
    bench.no_compile = {
        VARIANTS[5]: "the compiler's process ended with -6: Assertion `index < size()' failed."
    }
    launched = []
    bench.run = lambda o, v: (launched.append(v), by_torch(o, v))[1]
    found = sweep(out, bench)
    assert {Variant(**row["variant"]) for row in found["rows"]} == {VARIANTS[2]}
    assert all(
        reason.startswith("does not compile: the compiler's")
        for reason in found["sweep"]["refused"].values()
    )
    assert len(found["sweep"]["refused"]) == 2 and VARIANTS[5] not in launched


def test_what_the_compiler_did_not_reach_is_compiled_before_its_point(out):
    bench = Bench(costs(v0=100, v5=1, v2=50))
    # both numbers of experts of all but the last job of the second GEMM
    bench.reach = 2 * 2 * len(VARIANTS) - 1
    found = sweep(out, bench)
    assert not found["sweep"]["refused"]
    assert [Variant(**row["variant"]) for row in found["rows"]] == [VARIANTS[5]] * 4
    assert len(bench.compiled) == 2 * 2 * len(VARIANTS) + 1


def test_a_point_is_judged_by_all_of_its_variants_or_not_reached(out):
    """The fastest is not compiled in time: neither does the rule stand, nor has the second a row.
    The next call goes on."""
    bench = Bench(costs(v0=100, v5=1, v2=50))
    bench.too_slow = {VARIANTS[5]}
    found = sweep(out, bench, POINTS[:2])
    assert not found["rows"] and not found["rule_stands"] and not found["sweep"]["failures"]
    assert found["sweep"]["not_reached"] == [point.label for point in POINTS[:2]]
    assert not bench.timed
    bench.too_slow.clear()
    found = sweep(out, bench, POINTS[:2])
    assert [Variant(**row["variant"]) for row in found["rows"]] == [VARIANTS[5]] * 2
    assert not found["sweep"]["not_reached"]


def test_a_sweep_that_is_killed_has_written_what_it_did_not_reach(out):
    bench = Bench(costs(v0=100))
    timed = bench.timer

    def timer(calls, repeats):
        if len(bench.timed) > 2 * len(VARIANTS):
            raise KeyboardInterrupt  # as little is done after it as after a kill
        return timed(calls, repeats)

    bench.timer = timer
    with pytest.raises(KeyboardInterrupt):
        sweep(out, bench, layers=LAYERS)
    found = json.loads(out.read_text())["sweep"]
    labels = [what.label for what in (*POINTS, *LAYERS)]
    assert list(found["points"]) == labels[:1] and found["not_reached"] == labels[1:]


def test_a_second_group_compiles_nothing_twice(out):
    bench = Bench(costs(v0=100))
    parts = [
        Group((point,)) for point in (Point(DOWN, 2, 64), Point(DOWN, 2, 128), Point(DOWN, 3, 256))
    ]
    Sweep(Record(out, CPU, dry=True), bench.tools(), 1e6).measure(parts)
    assert [job.experts for job in bench.compiled] == [n for _ in VARIANTS for n in (4, 2)] + [
        3
    ] * len(VARIANTS)


def test_where_the_rules_own_does_not_run_the_best_other_is_taken(out):
    bench = Bench(costs(v0=100, v3=150))
    bench.no_compile = {RULE: "no"}
    row = sweep(out, bench, POINTS[:1])["rows"][0]
    assert Variant(**row["variant"]) == VARIANTS[3] and row["rule_us"] is None


def test_kernels_are_compiled_for_the_experts_they_run_with(out):
    bench = Bench(costs(v0=100))
    sweep(out, bench, [Point(DOWN, 2, 64), Point(DOWN, 3, 128)])
    assert {(job.experts, job.dtype) for job in bench.compiled} == {
        (4, "float32"),
        (2, "float32"),
        (3, "float32"),
    }
    assert len(bench.compiled) == len(set(bench.compiled)) == 3 * len(VARIANTS)


# ---- the budget, and going on --------------------------------------------------------------------


def test_the_budget_is_kept_and_a_second_call_goes_on(out):
    bench = Bench(costs(v0=100, v1=50))
    first = sweep(out, bench, seconds=5.6)
    assert bench.seconds <= 5.6
    done = list(first["sweep"]["points"])
    left = first["sweep"]["not_reached"]
    assert done and left and [*done, *left] == [point.label for point in POINTS]
    bench.timed.clear()
    compiled = len(bench.compiled)
    second = sweep(out, bench)
    assert (
        list(second["sweep"]["points"]) == [point.label for point in POINTS]
        and not second["sweep"]["not_reached"]
    )
    assert {label: second["sweep"]["points"][label] for label in done} == first["sweep"]["points"]
    # nothing twice
    assert sum(repeats == 3 for _, repeats in bench.timed) == len(left) * len(VARIANTS)
    assert len(second["rows"]) == 4
    assert all(
        job.gemm in {p.gemm for p in POINTS if p.label in left} for job in bench.compiled[compiled:]
    )


def test_a_slow_point_lowers_what_is_begun(out):
    """Points take 4 s: with 5 s left no other is begun, though 5 are more than the least."""
    bench = Bench(costs(v0=100))
    timed = bench.timer

    def timer(calls, repeats):
        bench.seconds += 2
        return timed(calls, repeats)

    bench.timer = timer
    found = sweep(out, bench, seconds=1 + 5.2 + 5.2)
    assert len(found["sweep"]["points"]) == 1 and len(found["sweep"]["not_reached"]) == 3


@pytest.mark.parametrize("field", ["gpu", "triton", "torch", "dry"])
def test_another_machines_file_is_not_continued(out, field):
    sweep(out, Bench(costs(v0=100)), POINTS[:1])
    found = json.loads(out.read_text())
    target = found["versions"] if field in ("torch", "triton") else found
    target[field] = "another"
    out.write_text(json.dumps(found))
    with pytest.raises(
        ValueError,
        match=f"begun with {field} 'another', but this is .*; give another --out, or remove it",
    ):
        Record(out, CPU, dry=True)


def test_order_of_points_and_what_their_buckets_are():
    """What matters most first; 30B before 235B; every bucket once for each GEMM, as the table has
    one row for each."""
    first, rest, big = groups()
    firsts = [(point.gemm.name, point.experts, point.rows) for point in first.points]
    names = [
        f"30b {name}" for name in ("gate_up forward", "down forward", "down dgrad", "gate_up dgrad")
    ]
    assert firsts == [*((name, 128, 512) for name in names), *((name, 16, 4096) for name in names)]
    for points in ((*first.points, *rest.points), big.points):
        keys = [(point.gemm, tuned.bucket_of(point.rows)) for point in points]
        assert len(keys) == len(set(keys)) == 4 * len(tuned.BUCKETS)
        assert {point.experts for point in points} == {128, 16}
        assert all(point.rows in tuned.BUCKETS for point in points)
    sizes = {
        gemm.name: (gemm.op, gemm.N, gemm.K, gemm.ranks, gemm.gathered)
        for gemm in (p.gemm for p in rest.points)
    }
    assert sizes == {
        "30b gate_up forward": ("forward", 1536, 2048, (16, 16), True),
        "30b down forward": ("forward", 2048, 768, (16,), False),
        "30b down dgrad": ("dgrad", 768, 2048, (16,), True),
        "30b gate_up dgrad": ("dgrad", 2048, 1536, (32,), False),
    }
    rows = [spec.num_rows // spec.experts for spec in (*first.layers, *rest.layers)]
    assert rows == sorted(rows, reverse=True) == [4096, 2048, 1024, 512, 256, 128]


# ---- the back end --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("us", "expected"),
    [
        ({256: (100, 80), 128: (100, 90), 64: (100, 120)}, 128),
        ({256: (100, 80), 128: (100, 90), 64: (100, 90)}, 64),
        ({256: (100, 120), 128: (100, 90), 64: (100, 90)}, None),
        ({256: (100, 80), 128: (100, 99), 64: (100, 90)}, 256),  # one per cent is noise
        ({256: (100, 80), 128: (100, None), 64: (100, 90)}, 256),  # could not run
        ({256: (None, 80), 128: (100, 90), 64: (100, 90)}, None),
    ],
)
def test_from_where_on_torchs_grouped_gemm_is_taken(out, us, expected):
    bench = Bench(costs(v0=100))
    bench.layer_us = us
    found = sweep(out, bench, POINTS[:1], layers=LAYERS)
    key = {"dtype": "float32", "hidden": 32, "intermediate": 16, "R": 16}
    assert found["layers"] == [{**key, "vendor_from": expected}]
    for rank in (4, 8, 16):
        taken = tuned.choices_for("cpu").vendor_from(torch.float32, 32, 16, rank)
        assert taken == (float("inf") if expected is None else expected)


def test_layers_are_timed_with_the_rows_found_so_far(out):
    """What a launch asks for in the layer, though it was asked before the sweep, with no table."""
    assert not tuned.choices_for("cpu").table.variants
    bench = Bench(costs(v0=100, v1=50))
    bench.layer_us = dict.fromkeys((256, 128, 64), (100.0, 90.0))
    seen = []
    layer = bench.layer
    bench.layer = lambda spec: (
        seen.append(set(tuned.choices_for("cpu").table.variants.values())),
        layer(spec),
    )[1]
    sweep(out, bench, layers=LAYERS)
    assert seen == [{VARIANTS[1]}] * 3


def test_a_layer_without_points_is_no_crossing():
    assert vendor_from([]) is None


# ---- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gemm", [GATE_UP, DOWN, DOWN_DGRAD, GATE_UP_DGRAD], ids=lambda gemm: gemm.name
)
def test_the_reference_and_the_launch_agree(gemm):
    """The product's own loop over experts, and the operands that training would give it."""
    from megalora_kernels.grouped_gemm import grouped_gemm_loop

    o = make_operands(gemm, (3, 0, 7, 1), CPU, torch.float32)
    assert (
        mistake(
            o,
            reference(o),
            RULE,
            lambda o, _: grouped_gemm_loop(o.x, o.w_EKN, o.routing, o.s_MR, o.b, o.source_M),
        )
        is None
    )
    assert (o.w_EKN.stride(1) == 1) == (gemm.op == "forward") and (
        o.source_M is not None
    ) == gemm.gathered


CHILD = """
import os, sys
for line in sys.stdin:
    if "abort" in line:
        print("LLVM ERROR: nothing", file=sys.stderr, flush=True)
        print("stack 1", file=sys.stderr, flush=True)
        os.abort()
    if "exit" in line:
        sys.exit("no module named triton")
    if "sleep" in line:
        import time
        time.sleep(60)
    print("TypeError: no" if "wrong" in line else "ok", flush=True)
"""


def job(word: str, number: int = 0) -> Job:
    return Job(replace(GATE_UP, name=f"{word} {number}"), 2, RULE)


def test_an_abort_loses_one_variant_and_not_the_sweep(monkeypatch):
    class Selector(selectors.DefaultSelector):
        """Time is up for the job that sleeps, as soon as it is asked for; the others take as long
        as they take."""

        def select(self, timeout: float | None = None) -> list[Any]:
            assert timeout == 3
            return super().select(0 if job_of_thread.sleeps else None)

    job_of_thread = threading.local()
    ask = tune_compile._Child.ask

    def noted(self: Any, line: str, seconds: float) -> str:
        job_of_thread.sleeps = "sleep" in line
        return ask(self, line, seconds)

    monkeypatch.setattr(tune_compile._Child, "ask", noted)
    monkeypatch.setattr(tune_compile.selectors, "DefaultSelector", Selector)
    good = [job("good", i) for i in range(5)]
    jobs = [good[0], job("abort"), good[1], job("wrong"), job("exit"), *good[2:], job("sleep")]
    found = compile_all(
        jobs, [sys.executable, "-c", CHILD], num_processes=2, seconds=3600, job_seconds=3
    )
    assert [found[j] for j in good] == [None] * 5
    assert found[job("wrong")] == "TypeError: no"
    assert found[job("abort")] == "the compiler's process ended with -6: LLVM ERROR: nothing"
    assert found[job("exit")] == "the compiler's process ended with 1: no module named triton"
    assert found[job("sleep")].startswith(
        "not compiled after 3 s; the compiler's process ended with -9"
    )


def test_a_job_that_the_end_cuts_off_is_not_refused(monkeypatch):
    """It had less than a compiler may take."""

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> list[Any]:
            assert timeout is not None and timeout < tune_compile.JOB_SECONDS
            return super().select(0)  # time is up at once

    monkeypatch.setattr(tune_compile.selectors, "DefaultSelector", Selector)
    slow = [job("sleep")]
    assert compile_all(slow, [sys.executable, "-c", CHILD], 1, seconds=30) == {}


def test_no_job_is_begun_when_time_is_over():
    assert compile_all([job("good")], [sys.executable, "-c", CHILD], 2, seconds=0) == {}


def test_a_job_survives_the_pipe():
    sent = Job(GATE_UP, 16, replace(OTHERS[-1], persistent=True), "float16")
    assert Job.read(sent.line()) == sent


# ---- the command line ----------------------------------------------------------------------------


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    env.pop("TRITON_INTERPRET", None)
    call = [sys.executable, "-m", "benchmarks.tune", *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_dry_run_goes_the_whole_way(tmp_path):
    out = tmp_path / "new" / "dry.json"
    done = command("--budget-seconds", 240, "--out", out, "--dry")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    sweep = found["sweep"]
    assert len(sweep["points"]) == 3 and len(sweep["crossing"]) == 1 and not sweep["not_reached"]
    assert not sweep["refused"], sweep["refused"]
    for point in sweep["points"].values():
        assert len(point["first_us"]) == 3 and min(point["first_us"].values()) > 0
    assert not next(iter(sweep["crossing"].values()))["problems"]
    assert (
        "times mean nothing" in found["measured"]["clocks"] and "times mean nothing" in done.stdout
    )
    assert set(found["measured"]) == set(tuned_fields()) and found["measured"]["triton"]
    again = command("--budget-seconds", 60, "--out", out, "--dry")
    assert (
        again.returncode == 0 and json.loads(out.read_text())["sweep"]["points"] == sweep["points"]
    )


def tuned_fields() -> Sequence[str]:
    from megalora_kernels.tuned_table import MEASURED

    return MEASURED


def test_mistakes_on_the_command_line(tmp_path):
    (tmp_path / "other.json").write_text('{"benchmark": "parity"}')
    (tmp_path / "text.json").write_text("{")
    for arguments, message in {
        (
            "--budget-seconds",
            0,
            "--out",
            tmp_path / "a.json",
        ): "--budget-seconds 0.0: want a positive number of seconds",
        ("--out", tmp_path): "is a folder; name a file",
        (
            "--out",
            tmp_path / "other.json",
        ): "is there and no result of this script; give another, or remove it",
        ("--out", tmp_path / "text.json"): "is there and no JSON",
        (): "the following arguments are required: --out",
    }.items():
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def sweep_by(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> tuple[int, int]:
    """(exit code, processes started) where each process of the sweep is a shell script."""
    program = folder / "python"
    program.write_text(
        f"#!/bin/sh\necho started >> {folder}/calls\nn=$(wc -l < {folder}/calls)\n{script}\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(tune.sys, "executable", str(program))
    code = tune.sweep(seconds, folder / "out.json", dry=False)
    return code, len((folder / "calls").read_text().splitlines())


@pytest.mark.parametrize(
    ("script", "code", "calls"),
    [
        ("exit 0", 0, 1),
        ("exit 1", 1, 1),
        ("exit 2", 2, 1),
        (
            '[ "$n" = 1 ] && exit 75; [ "$n" = 2 ] && exit 76; [ "$n" = 3 ] && kill -6 $$; exit 0',
            0,
            4,
        ),
    ],
)
def test_a_sweep_that_a_variant_ends_is_started_again(script, code, calls, tmp_path, monkeypatch):
    assert sweep_by(script, tmp_path, monkeypatch, seconds=100) == (code, calls)


def test_a_sweep_is_ended_when_its_budget_is_spent(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        time_is_up_when(patch, (tmp_path / "calls").is_file)
        # and nothing was written; had it been left to sleep, it would have ended with 0
        assert sweep_by("exec sleep 600", tmp_path, monkeypatch, seconds=1000) == (1, 1)
    # with so little left, not once more
    little = tune.LEAST_SECONDS - 1
    assert sweep_by("exit 75", tmp_path, monkeypatch, seconds=little)[1] == 2
