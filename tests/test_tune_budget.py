"""A sweep that time, a kill or another machine cuts short: what is written, and where a second call
goes on."""

import json

import pytest

from benchmarks.tune_points import Group, Point
from benchmarks.tune_record import Record
from benchmarks.tune_sweep import Sweep
from tests.made_up_sweep import (
    CPU,
    DOWN,
    LAYERS,
    POINTS,
    VARIANTS,
    Bench,
    costs,
    place_for_a_table,
    sweep,
    variants_of,
)


def labels(items) -> list[str]:
    """What a record calls points and layers."""
    return [item.label for item in items]


@pytest.fixture
def out(tmp_path, monkeypatch):
    yield from place_for_a_table(tmp_path, monkeypatch)


def test_what_the_compiler_did_not_reach_is_compiled_before_its_point(out):
    bench = Bench(costs(v0=100, v5=1, v2=50))
    # Two GEMMs, each variant of them for two numbers of experts; all jobs but the last.
    bench.reach = 2 * 2 * len(VARIANTS) - 1
    found = sweep(out, bench)
    assert not found["sweep"]["refused"]
    assert variants_of(found) == [VARIANTS[5]] * 4
    # The last one was asked for twice.
    assert len(bench.compiled) == 2 * 2 * len(VARIANTS) + 1


def test_a_point_is_judged_by_all_of_its_variants_or_not_reached(out):
    """The fastest is not compiled in time: neither does the rule stand, nor has the second a row.
    The next call goes on."""
    bench = Bench(costs(v0=100, v5=1, v2=50))
    bench.too_slow = {VARIANTS[5]}
    found = sweep(out, bench, POINTS[:2])
    # No verdict of any kind.
    assert not found["rows"] and not found["rule_stands"] and not found["sweep"]["failures"]
    assert found["sweep"]["not_reached"] == labels(POINTS[:2])
    assert not bench.timed
    bench.too_slow.clear()
    found = sweep(out, bench, POINTS[:2])
    assert variants_of(found) == [VARIANTS[5]] * 2
    assert not found["sweep"]["not_reached"]


def test_a_sweep_that_is_killed_has_written_what_it_did_not_reach(out):
    bench = Bench(costs(v0=100))
    timed = bench.timer

    def timer(calls, repeats):
        # In the second point. As little is done after a KeyboardInterrupt as after a kill.
        if len(bench.timed) > 2 * len(VARIANTS):
            raise KeyboardInterrupt
        return timed(calls, repeats)

    bench.timer = timer
    with pytest.raises(KeyboardInterrupt):
        sweep(out, bench, layers=LAYERS)
    found = json.loads(out.read_text())["sweep"]
    first, *others = labels([*POINTS, *LAYERS])
    assert list(found["points"]) == [first] and found["not_reached"] == others


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


def test_the_budget_is_kept_and_a_second_call_goes_on(out):
    bench = Bench(costs(v0=100, v1=50))
    # By the made-up clock the compiler takes 1 s a call and a point some 1.2 s: a few points fit.
    first = sweep(out, bench, seconds=5.6)
    assert bench.seconds <= 5.6
    done = list(first["sweep"]["points"])
    left = first["sweep"]["not_reached"]
    assert done and left and [*done, *left] == labels(POINTS)
    bench.timed.clear()
    compiled = len(bench.compiled)
    second = sweep(out, bench)
    assert list(second["sweep"]["points"]) == labels(POINTS)
    assert not second["sweep"]["not_reached"]
    assert len(second["rows"]) == 4
    for label, point in first["sweep"]["points"].items():
        assert second["sweep"]["points"][label] == point
    # Nothing is timed or compiled twice.
    first_rounds = [label for label, repeats in bench.timed if repeats == 3]
    assert len(first_rounds) == len(left) * len(VARIANTS)
    still_to_do = {point.gemm for point in POINTS if point.label in left}
    for job in bench.compiled[compiled:]:
        assert job.gemm in still_to_do


def test_a_slow_point_lowers_what_is_begun(out):
    """Points take 4 s: with 5 s left no other is begun, though 5 are more than the least."""
    bench = Bench(costs(v0=100))
    timed = bench.timer

    def timer(calls, repeats):
        bench.seconds += 2
        return timed(calls, repeats)

    bench.timer = timer
    found = sweep(out, bench, seconds=1 + 5.2 + 5.2)
    assert len(found["sweep"]["points"]) == 1
    assert len(found["sweep"]["not_reached"]) == 3


@pytest.mark.parametrize("field", ["gpu", "triton", "torch", "dry"])
def test_another_machines_file_is_not_continued(out, field):
    sweep(out, Bench(costs(v0=100)), POINTS[:1])
    found = json.loads(out.read_text())
    if field in ("torch", "triton"):
        found["versions"][field] = "another"
    else:
        found[field] = "another"
    out.write_text(json.dumps(found))
    with pytest.raises(
        ValueError,
        match=f"begun with {field} 'another', but this is .*; give another --out, or remove it",
    ):
        Record(out, CPU, dry=True)
