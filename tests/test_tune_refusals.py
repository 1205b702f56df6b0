"""What the sweep refuses: variants that are wrong, do not compile or take the device down."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megalora_kernels.variants import Variant

from benchmarks.tune_points import (
    Operands,
    Point,
    make_operands,
    mistake,
    reference,
    variant_label,
)
from benchmarks.tune_record import Record
from benchmarks.tune_sweep import DeadDevice
from tests.made_up_sweep import (
    CPU,
    DOWN,
    GATE_UP,
    LAYERS,
    POINTS,
    RULE,
    VARIANTS,
    Bench,
    by_torch,
    costs,
    place_for_a_table,
    rows_of,
    sweep,
    variants_of,
)


@pytest.fixture
def out(tmp_path, monkeypatch):
    yield from place_for_a_table(tmp_path, monkeypatch)


def with_bug(which: Variant, bug: Callable[[Operands, torch.Tensor], torch.Tensor | None]) -> Any:
    """A launcher of which one variant computes what ``bug`` makes of the right result."""

    def run(o: Operands, variant: Variant) -> torch.Tensor:
        y_MN = by_torch(o, variant)
        if variant != which:
            return y_MN
        changed = bug(o, y_MN)
        # A bug that returns nothing has changed the result in place.
        return y_MN if changed is None else changed

    return run


def one_row_of_the_neighbours_expert(o: Operands, y_MN: torch.Tensor) -> None:
    y_MN[-1] = y_MN[0]


def unwritten(o: Operands, y_MN: torch.Tensor) -> torch.Tensor:
    """The last rows are never stored. Memory of the call before would hold the right ones by
    chance."""
    # ``mistake`` has torch fill new memory with NaN before it calls a variant. Where it does not,
    # this variant would pass: then it must, so that the test shows what is missing.
    y = o.x.new_empty(y_MN.shape)
    if not y.isnan().all():
        return y_MN
    y[:-3] = y_MN[:-3]
    return y


def without_adapter(o: Operands, y_MN: torch.Tensor) -> torch.Tensor:
    zeros = [torch.zeros_like(b) for b in o.b]
    return reference(replace(o, b=tuple(zeros)))


def blocks_swapped(o: Operands, y_MN: torch.Tensor) -> torch.Tensor:
    """The B of gate for up, and that of up for gate."""
    return reference(replace(o, b=o.b[::-1]))


def rows_not_gathered(o: Operands, y_MN: torch.Tensor) -> torch.Tensor:
    """Each row takes its neighbour's token."""
    assert o.source_M is not None
    return reference(replace(o, source_M=o.source_M.roll(1)))


CALLS = itertools.count()


def other_bits(o: Operands, y_MN: torch.Tensor) -> torch.Tensor:
    """Every other call differs, by less than rounding may."""
    return y_MN * (1 + 1e-6 * (next(CALLS) % 2))


WRONG = (
    one_row_of_the_neighbours_expert,
    unwritten,
    without_adapter,
    blocks_swapped,
    rows_not_gathered,
    other_bits,
)


@pytest.mark.parametrize("bug", WRONG, ids=lambda bug: bug.__name__)
def test_a_wrong_variant_gets_no_row_though_it_is_the_fastest(out, bug):
    wrong = VARIANTS[2]
    bench = Bench(costs(v0=100, v2=1, v3=80), run=with_bug(wrong, bug))
    found = sweep(out, bench, [Point(GATE_UP, 2, 64)])
    assert variants_of(found) == [VARIANTS[3]]
    ((name, why),) = found["sweep"]["refused"].items()
    assert name == f"tiny gate_up forward: {variant_label(wrong)}"
    if bug is other_bits:
        # Right within rounding, but not twice the same.
        assert why.startswith("wrong: other bits")
        assert "rows differ from float32" not in why
    else:
        assert why.startswith("wrong: ")
        assert "rows differ from float32" in why
    for label, _ in bench.timed:
        assert label != variant_label(wrong)


def test_one_wrong_row_among_many_is_found():
    """In bfloat16, where the whole would differ by 0.4 %, less than rounding may."""
    o = make_operands(DOWN, (80_000,), CPU, torch.bfloat16)
    want_MN = reference(o)
    right_MN = want_MN.bfloat16()
    assert mistake(o, want_MN, RULE, lambda *_: right_MN) is None
    wrong_MN = right_MN.clone()
    wrong_MN[777] = right_MN[0]
    why = str(mistake(o, want_MN, RULE, lambda *_: wrong_MN))
    assert why.startswith("wrong: 1 of 80000 rows differ from float32")


def test_a_variant_wrong_at_many_rows_alone_is_found_at_the_point(out):
    """Right on the few uneven experts, wrong with 128 rows each."""
    wrong = VARIANTS[2]

    def run(o: Operands, variant: Variant) -> torch.Tensor:
        y_MN = by_torch(o, variant)
        # Two experts with 128 rows.
        if variant == wrong and o.routing.num_rows == 256:
            y_MN[200, 3] += 1
        return y_MN

    points = [Point(DOWN, 2, 64), Point(DOWN, 2, 128)]
    found = sweep(out, Bench(costs(v0=100, v2=1), run=run), points)
    # At 64 rows it is right, so that it has its row there.
    assert rows_of(found) == [64]
    why = found["sweep"]["refused"][f"tiny down forward: {variant_label(wrong)}"]
    assert "1 of 256 rows differ" in why


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
    # Once for each of two GEMMs; a new process finds the device alive again.
    for _ in range(2):
        with pytest.raises(DeadDevice, match="illegal memory access"):
            sweep(out, bench)
        bench.alive = True
    found = sweep(out, bench)
    assert len(found["sweep"]["refused"]) == 2
    assert variants_of(found) == [VARIANTS[3]] * 4


def test_a_variant_that_took_the_process_down_is_refused_by_the_next(out):
    Record(out, CPU, dry=True).save()
    name = f"tiny gate_up forward: {variant_label(VARIANTS[3])}"
    # What a process writes before it runs a variant for the first time, and removes after it.
    out.with_suffix(".running").write_text(name)
    found = sweep(out, Bench(costs(v0=100, v3=1, v1=50)), POINTS[:1])
    assert found["sweep"]["refused"] == {name: "the process ended, or hung, while it ran"}
    assert Variant(**found["rows"][0]["variant"]) == VARIANTS[1]
    assert not out.with_suffix(".running").exists()


def test_a_point_that_fails_is_named_and_the_others_go_on(out):
    """The layer runs out of memory, and one GEMM has no variant that is right."""
    bench = Bench(costs(v0=100, v1=50))
    # Of 64 rows it knows nothing: KeyError.
    bench.layer_us = {256: (100, 80), 128: (100, 90)}

    def run(o: Operands, variant: Variant) -> torch.Tensor:
        y_MN = by_torch(o, variant)
        # Of the two GEMMs, down does not gather its rows: all its variants are wrong.
        return 2 * y_MN if o.source_M is None else y_MN

    bench.run = run
    found = sweep(out, bench, layers=LAYERS)
    # Both points of gate_up.
    assert [row["N"] for row in found["rows"]] == [GATE_UP.N] * 2
    assert len(found["sweep"]["crossing"]) == 2
    failures = found["sweep"]["failures"]
    down_64 = "tiny down forward 2 x 64"
    down_128 = "tiny down forward 2 x 128"
    assert list(failures) == [down_64, down_128, LAYERS[2].label]
    assert "no variant computes it" in failures[down_64]
    assert failures[LAYERS[2].label] == "KeyError: 64"


def test_a_device_that_dies_while_it_is_timed_does_not_die_of_the_same_point_again(out):
    bench = Bench(costs(v0=100, v1=50))
    timed = bench.timer

    def timer(calls, repeats):
        # In round two of the first point.
        if repeats == 20 and len(bench.timed) < 8:
            bench.alive = False
            raise RuntimeError("CUDA error: unspecified launch failure")
        return timed(calls, repeats)

    bench.timer = timer
    with pytest.raises(DeadDevice, match="tiny gate_up forward 2 x 64"):
        sweep(out, bench)
    bench.alive = True
    # The next process leaves that point out and measures the other three.
    found = sweep(out, bench)
    assert list(found["sweep"]["failures"]) == ["tiny gate_up forward 2 x 64"]
    assert len(found["rows"]) == 3


def test_what_does_not_compile_is_refused_and_never_launched(out):
    bench = Bench(costs(v0=100, v5=1, v2=50))
    bench.no_compile = {
        VARIANTS[5]: "the compiler's process ended with -6: Assertion `index < size()' failed."
    }
    launched = []

    def run(o: Operands, variant: Variant) -> torch.Tensor:
        launched.append(variant)
        return by_torch(o, variant)

    bench.run = run
    found = sweep(out, bench)
    assert set(variants_of(found)) == {VARIANTS[2]}
    # Once for each of the two GEMMs.
    assert len(found["sweep"]["refused"]) == 2
    for reason in found["sweep"]["refused"].values():
        assert reason.startswith("does not compile: the compiler's")
    assert VARIANTS[5] not in launched


def test_where_the_rules_own_does_not_run_the_best_other_is_taken(out):
    bench = Bench(costs(v0=100, v3=150))
    bench.no_compile = {RULE: "no"}
    row = sweep(out, bench, POINTS[:1])["rows"][0]
    assert Variant(**row["variant"]) == VARIANTS[3] and row["rule_us"] is None


def test_kernels_are_compiled_for_the_experts_they_run_with(out):
    bench = Bench(costs(v0=100))
    sweep(out, bench, [Point(DOWN, 2, 64), Point(DOWN, 3, 128)])
    assert {job.dtype for job in bench.compiled} == {"float32"}
    # Four are those of the uneven check; 2 and 3 those of the points.
    assert {job.experts for job in bench.compiled} == {4, 2, 3}
    assert len(bench.compiled) == len(set(bench.compiled)) == 3 * len(VARIANTS)
