"""Calibration: what it measures, that every rank measures the same, and what the record says of
it."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megalora import host
from megalora.bench import calibrate as calibration
from megalora.bench import clock, overhead
from megalora.bench.calibrate_grid import CPU, Grid
from megalora.bench.clock import Clock
from megalora.planner.gpus import read_machine
from tests.bench.made_up_clock import NANOSECOND, MadeUpClock, WorkTakesTime
from tests.distributed.ranks import run_ranks

KEYS = [
    "format", "name", "memory_bytes", "ranks_per_node", "world_size", "dtype", "when", "versions",
    "commit",
    "gemm", "grouped_gemm", "attention", "memory", "collectives", "overhead",
]  # fmt: skip
SIZES = {
    "gemm": ["rows", "outputs", "inputs", "seconds"],
    "grouped_gemm": ["experts", "rows", "outputs", "inputs", "seconds"],
    "attention": [
        "sequences", "sequence", "heads", "kv_heads", "head_dim", "forward_seconds",
        "backward_seconds",
    ],
    "memory": ["bytes", "seconds"],
}  # fmt: skip
COLLECTIVES = ["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]
HARDLY_ANY_S = 1e-6
"""Budget that is spent at once, so that only the two sizes of each kind that always are measured
are."""
PLENTY_S = 600
"""Budget that the made-up clock never reaches."""
type Run = tuple[dict[str, Any], list[tuple[dict[str, Any], list[str]]]]


def _calibrate(
    out: Path, dtype: str, budget_seconds: float, ranks_per_node: int, grid: Grid
) -> tuple[dict[str, Any], list[str]]:
    """Run in each rank: what it measured by a made-up clock, and what it said."""
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    calibration.CPU = grid
    # Two calls in a row and two samples are enough, because a made-up clock always says the same.
    clock.ON_CPU = clock.Effort(1e-3, 10e-3, most_in_a_row=2, min_samples=2, max_samples=2)
    found = {}
    said = []
    measure = calibration._measure

    def kept(*args: Any) -> dict[str, Any]:
        found.update(measure(*args))
        return found

    calibration._measure = kept
    # A tick far below any work, so that no sample takes no time.
    made_up = MadeUpClock(tick=NANOSECOND / 1000)
    by_the_clock = Clock.seconds

    def by_work(self: Clock, calls: Any, **how: Any) -> float:
        with WorkTakesTime(made_up):
            return by_the_clock(self, calls, **how)

    Clock.seconds = by_work  # type: ignore[method-assign]
    calibration.calibrate(out, dtype=dtype, budget_seconds=budget_seconds, say=said.append)
    assert out.exists(), "no rank goes on before the record is there"
    return found, said


def _run(
    folder: Path,
    world: int,
    dtype: str,
    budget_seconds: float,
    ranks_per_node: int,
    grid: Grid = CPU,
) -> Run:
    out = folder / "made" / "machine.json"
    ranks = run_ranks(_calibrate, world, out, dtype, budget_seconds, ranks_per_node, grid)
    # No temporary file is left beside the record.
    assert list(out.parent.iterdir()) == [out]
    return json.loads(out.read_text()), ranks


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, every size."""
    return _run(tmp_path_factory.mktemp("one"), 1, "float32", PLENTY_S, 1)[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks of one node, the fewest sizes, bfloat16."""
    return _run(tmp_path_factory.mktemp("two"), 2, "bfloat16", HARDLY_ANY_S, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four ranks that believe to be on two nodes, the fewest sizes, and small ones: they share the
    cores of one."""
    small = {
        "gemm_rows": (32, 128),
        "rows_per_expert": (4, 16),
        "sequence": (32, 64),
        "memory_bytes": (2**16, 2**20),
    }
    return _run(
        tmp_path_factory.mktemp("four"),
        4,
        "float32",
        HARDLY_ANY_S,
        2,
        dataclasses.replace(CPU, **small),
    )


def _points(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Measured points by kind, collectives among them."""
    computed = {kind: record[kind] for kind in SIZES}
    return computed | record["collectives"]


def _triples(points: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """(rows, outputs, inputs) of each product."""
    return [(p["rows"], p["outputs"], p["inputs"]) for p in points]


def _arithmetic(product: dict[str, Any]) -> int:
    """Multiplications of a product [rows, inputs] x [inputs, outputs]."""
    return product["rows"] * product["outputs"] * product["inputs"]


def _check_record(record: dict[str, Any]) -> None:
    """The record's form, whatever was measured."""
    assert list(record) == KEYS and record["format"] == 1 and record["name"] == "CPU"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["when"])
    assert {"torch", "triton", "megatron-core"} <= record["versions"].keys()
    # An installed package has no commit.
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", record["commit"])
    over = record["overhead"]
    assert over["layer_forward_s"] > 0 < over["layer_backward_s"] and over["step_s"] >= 0
    assert sum(over.values()) < 10
    for kind, points in _points(record).items():
        assert len(points) >= 2, kind
        for point in points:
            assert list(point) == SIZES.get(kind, ["ranks", "nodes", "bytes", "seconds"])
            for key, value in point.items():
                assert math.isfinite(value) and value > 0, (kind, point)
                assert isinstance(value, float if "seconds" in key else int), (kind, key)


@pytest.mark.slow
def test_one_rank_measures_every_size(whole: dict[str, Any]) -> None:
    _check_record(whole)
    assert whole["collectives"] == {} and (whole["world_size"], whole["ranks_per_node"]) == (1, 1)
    assert whole["memory_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Two tensors read and one written, 4 bytes an element: whole multiples of 12 bytes.
    for point, num_bytes in zip(whole["memory"], CPU.memory_bytes, strict=True):
        assert point["bytes"] == num_bytes // 12 * 12
    expected = set()
    for rows in CPU.gemm_rows:
        for features in CPU.gemm_features:
            expected.add((rows, *features))
    measured = _triples(whole["gemm"])
    assert set(measured) == expected and len(measured) == len(expected)
    assert {p["rows"] // p["experts"] for p in whole["grouped_gemm"]} == set(CPU.rows_per_expert)
    assert {p["sequence"] for p in whole["attention"]} == set(CPU.sequence)


@pytest.mark.slow
def test_the_planner_reads_what_is_written(pair: Run, tmp_path: Path) -> None:
    record = pair[0]
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(record))
    machine = read_machine(path)
    point = record["gemm"][0]
    rate = machine.gemm.at(point["rows"], point["outputs"], point["inputs"])
    # A rate in FLOP/s: a multiplication and an addition each.
    assert rate.basis == "measured"
    assert rate.value == pytest.approx(2 * _arithmetic(point) / point["seconds"])
    sent = record["collectives"]["send"][0]
    assert machine.network.seconds("send", sent["ranks"], 1, sent["bytes"]) == (
        sent["seconds"],
        "measured",
    )
    assert machine.overhead.layer_forward_s == record["overhead"]["layer_forward_s"]
    # On a CPU the host computes itself: its time cannot hide behind a device's.
    assert not machine.overhead.hidden


@pytest.mark.slow
def test_more_work_takes_longer(whole: dict[str, Any]) -> None:
    gemm = sorted(whole["gemm"], key=_arithmetic)
    # 65,536 times the arithmetic: 2,048 * 1,024² against 32³.
    assert gemm[-1]["seconds"] > 100 * gemm[0]["seconds"]
    # 1,024 times the traffic
    assert whole["memory"][-1]["seconds"] > 10 * whole["memory"][0]["seconds"]
    # Scores of every pair of tokens: the sequence counts twice.
    by_work = sorted(
        whole["attention"],
        key=lambda p: p["sequences"] * p["sequence"] ** 2 * p["heads"] * p["head_dim"],
    )
    for seconds in ("forward_seconds", "backward_seconds"):
        assert by_work[-1][seconds] > 5 * by_work[0][seconds]


@pytest.mark.slow
def test_gemm_seconds_are_those_of_one_product(whole: dict[str, Any]) -> None:
    # The clock is told a nanosecond for each FLOP: calls in a row must be divided out again.
    for point in whole["gemm"]:
        flops = 2 * _arithmetic(point)
        assert point["seconds"] == pytest.approx(flops * NANOSECOND)


@pytest.mark.slow
def test_two_points_of_everything_however_little_time(pair: Run, four: Run) -> None:
    # Groups of collectives: two ranks make one; four on two nodes three (see below).
    for (record, _), groups in ((pair, 1), (four, 3)):
        _check_record(record)
        points = _points(record)
        assert points.keys() == {*SIZES, *COLLECTIVES}
        for kind, of_kind in points.items():
            # The smallest and the largest size, collectives in each kind of group.
            assert len(of_kind) == (2 if kind in SIZES else 2 * groups), kind
        ends = {CPU.collective_bytes[0], CPU.collective_bytes[-1]}
        for name in COLLECTIVES:
            assert {point["bytes"] for point in record["collectives"][name]} == ends


@pytest.mark.slow
def test_what_it_says_of_the_world(pair: Run, four: Run) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for (record, _), world, dtype in ((pair, 2, "bfloat16"), (four, 4, "float32")):
        assert (record["world_size"], record["ranks_per_node"]) == (world, 2)
        assert record["dtype"] == dtype
        # What a rank may use: the two of a node share its memory.
        assert record["memory_bytes"] == machine // 2
    # (ranks, nodes): four ranks on two nodes also meet in pairs, within a node and across.
    for record, expected in ((pair[0], {(2, 1)}), (four[0], {(2, 1), (4, 2), (2, 2)})):
        for name in COLLECTIVES:
            points = record["collectives"][name]
            assert {(p["ranks"], p["nodes"]) for p in points} == expected, name


@pytest.mark.slow
def test_large_computations_take_longer_on_two_ranks(pair: Run) -> None:
    for kind in ("gemm", "grouped_gemm", "memory"):
        small, large = pair[0][kind]
        assert large["seconds"] > small["seconds"], kind


@pytest.mark.slow
def test_large_collectives_take_longer(pair: Run) -> None:
    # By the made-up clock a nanosecond for each element that takes part.
    small, large = pair[0]["collectives"]["all_reduce"]
    assert (small["bytes"], large["bytes"]) == (1024, 4 * 2**20)
    assert large["seconds"] > small["seconds"]


@pytest.mark.slow
def test_ranks_agree_and_rank_0_speaks(pair: Run, four: Run) -> None:
    for record, ranks in (pair, four):
        for measured, _ in ranks:
            assert measured == _points(record)
        (_, said_first), *others = ranks
        assert any(line.startswith("measured ") for line in said_first)
        for _, said in others:
            assert said == []


def _as_on_a_gpu(out: Path, grid: Grid) -> tuple[dict[str, Any], int, set[int]]:
    """The GPU's way through calibration, its clock and its device apart: ``host.install`` reads
    "cuda" as "cpu" where there is none.

    Returns what was measured, how often the cache was emptied, and the numbers of copies that calls
    went round.
    """
    host.device = lambda: torch.device("cuda")
    clock.FLUSH_BYTES = calibration.FLUSH_BYTES = 2**16
    calibration.GPU = grid
    rings: set[int] = set()
    seconds = Clock.seconds

    def noted(self: Clock, calls: Any, **how: Any) -> float:
        rings.add(len(calls))
        return seconds(self, calls, **how)

    Clock.seconds = noted  # type: ignore[method-assign]
    # The device is kept busy once in each sample.
    spins: list[Any] = []
    host.keep_busy = spins.append
    # It would build models, which ask CUDA themselves.
    overhead.layer_overhead = lambda dtype: {}
    measured, _ = _calibrate(out, "bfloat16", HARDLY_ANY_S, 2, CPU)
    return measured, len(spins), rings


def test_the_gpu_s_way_ends(tmp_path: Path) -> None:
    small = {"gemm_rows": (32, 128), "sequence": (32, 64), "memory_bytes": (2**10, 2**20)}
    ranks = run_ranks(_as_on_a_gpu, 2, tmp_path / "x.json", dataclasses.replace(CPU, **small))
    assert ranks[0] == ranks[1]
    measured, num_samples, rings = ranks[0]
    assert measured == _points(json.loads((tmp_path / "x.json").read_text()))
    # Two sizes each of four computations, of which attention has two calls to time, and of five
    # collectives. Each takes four samples: one to see how long a call takes, and the fewest that
    # ``clock.ON_GPU`` asks for, three.
    assert num_samples == 4 * (2 * (3 + 2) + 2 * 5)
    assert {1, clock.MOST_COPIES} <= rings
