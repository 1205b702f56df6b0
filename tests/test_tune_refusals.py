"""What the sweep refuses: variants that are wrong, do not compile or take the device down, and
points beyond its budget."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megalora_kernels.variants import Variant

from benchmarks.tune_points import (
    Group,
    Operands,
    Point,
    make_operands,
    mistake,
    reference,
    variant_label,
)
from benchmarks.tune_record import Record
from benchmarks.tune_sweep import DeadDevice, Sweep
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
    timed = {label for label, _ in bench.timed}
    assert variant_label(wrong) not in timed


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
    for _ in range(2):  # once for each GEMM
        with pytest.raises(DeadDevice, match="illegal memory access"):
            sweep(out, bench)
        bench.alive = True  # a new process
    found = sweep(out, bench)
    assert len(found["sweep"]["refused"]) == 2
    assert variants_of(found) == [VARIANTS[3]] * 4


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
    assert [row["N"] for row in found["rows"]] == [GATE_UP.N] * 2
    assert len(found["sweep"]["crossing"]) == 2
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


def test_what_the_compiler_did_not_reach_is_compiled_before_its_point(out):
    bench = Bench(costs(v0=100, v5=1, v2=50))
    # both numbers of experts of all but the last job of the second GEMM
    bench.reach = 2 * 2 * len(VARIANTS) - 1
    found = sweep(out, bench)
    assert not found["sweep"]["refused"]
    assert variants_of(found) == [VARIANTS[5]] * 4
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
    assert variants_of(found) == [VARIANTS[5]] * 2
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
        Group((Point(DOWN, 2, 64),)),
        Group((Point(DOWN, 2, 128),)),
        Group((Point(DOWN, 3, 256),)),
    ]
    Sweep(Record(out, CPU, dry=True), bench.tools(), 1e6).measure(parts)
    # The first group is checked with four uneven experts and timed with two, as the second is;
    # the third brings a new number of experts.
    expected = [4, 2] * len(VARIANTS) + [3] * len(VARIANTS)
    assert [job.experts for job in bench.compiled] == expected


def test_where_the_rules_own_does_not_run_the_best_other_is_taken(out):
    bench = Bench(costs(v0=100, v3=150))
    bench.no_compile = {RULE: "no"}
    row = sweep(out, bench, POINTS[:1])["rows"][0]
    assert Variant(**row["variant"]) == VARIANTS[3] and row["rule_us"] is None


def test_kernels_are_compiled_for_the_experts_they_run_with(out):
    bench = Bench(costs(v0=100))
    sweep(out, bench, [Point(DOWN, 2, 64), Point(DOWN, 3, 128)])
    assert {job.dtype for job in bench.compiled} == {"float32"}
    assert {job.experts for job in bench.compiled} == {4, 2, 3}
    assert len(bench.compiled) == len(set(bench.compiled)) == 3 * len(VARIANTS)


def test_the_budget_is_kept_and_a_second_call_goes_on(out):
    bench = Bench(costs(v0=100, v1=50))
    first = sweep(out, bench, seconds=5.6)
    assert bench.seconds <= 5.6
    done = list(first["sweep"]["points"])
    left = first["sweep"]["not_reached"]
    labels = [point.label for point in POINTS]
    assert done and left and [*done, *left] == labels
    bench.timed.clear()
    compiled = len(bench.compiled)
    second = sweep(out, bench)
    assert list(second["sweep"]["points"]) == labels
    assert not second["sweep"]["not_reached"]
    assert len(second["rows"]) == 4
    for label, point in first["sweep"]["points"].items():
        assert second["sweep"]["points"][label] == point
    # Nothing is timed or compiled twice.
    first_rounds = [label for label, repeats in bench.timed if repeats == 3]
    assert len(first_rounds) == len(left) * len(VARIANTS)
    still_to_do = {point.gemm for point in POINTS if point.label in left}
    assert {job.gemm for job in bench.compiled[compiled:]} <= still_to_do


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
