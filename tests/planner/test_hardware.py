"""Check rates at, between and beyond what was measured, groups of ranks on nodes, and calibration
files with mistakes in them."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megalora.planner.gpus import GPUS, find_machine, read_machine, with_ranks_per_node
from megalora.planner.hardware import Kind, Links, MeasuredNetwork, Roofline, Table, weakest
from megalora.planner.known_gpus import known_gpu


def test_a_table_is_exact_where_it_was_measured_and_says_how_it_knows_the_rest() -> None:
    # (rows, columns) and the FLOP/s that were measured there.
    table = Table((((64, 256), 1e9), ((256, 256), 2e9), ((1024, 256), 4e9), ((1024, 1024), 8e9)))
    assert table.at(256, 256) == (2e9, "measured")
    between = table.at(512, 256)
    assert 2e9 < between.value < 5e9 and between.basis == "interpolated"
    beyond = table.at(100_000, 256)
    # Never faster than the best measurement, however large the product.
    assert 2e9 < beyond.value < 8e9 and beyond.basis == "extrapolated"
    # Remembered: a plan asks thousands of times for the same sizes.
    assert table.at(512, 256) is between


def test_a_roofline_is_arithmetic_or_traffic() -> None:
    roof = Roofline(flops_per_s=1e12, bytes_per_s=1e9)
    # A million rows: all arithmetic.
    assert roof.at(2**20, 4096, 4096).value == pytest.approx(1e12, rel=1e-6)
    # One row: all traffic, of inputs, outputs and the weight in bfloat16.
    rows = 1
    outputs = 1024
    inputs = 512
    seconds = 2 * (rows * (outputs + inputs) + outputs * inputs) / 1e9
    assert roof.at(rows, outputs, inputs).value == pytest.approx(
        2 * rows * outputs * inputs / seconds
    )
    # 64 rows over eight experts: all eight weights are read.
    grouped = 2 * (64 * (outputs + inputs) + 8 * outputs * inputs) / 1e9
    assert roof.at(8, 64, outputs, inputs).value == pytest.approx(
        2 * 64 * outputs * inputs / grouped
    )


def test_weakest() -> None:
    assert weakest(["measured", "assumed", "interpolated"]) == "assumed"
    assert weakest(["extrapolated", "interpolated"]) == "extrapolated"
    assert weakest(["measured", "interpolated"]) == "interpolated" and weakest([]) == "measured"


def test_links_move_what_each_collective_moves() -> None:
    links = Links(100e9, 10e9, inside_latency_s=0, outside_latency_s=0)
    size = 8e9
    # Of n parts, a ring passes n - 1 on; an all-reduce does so twice.
    assert links.seconds("all_gather", 8, 1, size).value == pytest.approx(7 / 8 * size / 100e9)
    assert links.seconds("all_reduce", 8, 1, size).value == pytest.approx(14 / 8 * size / 100e9)
    # 16 ranks on 2 nodes: half of an all-to-all leaves the node, each rank through its own adapter;
    # a ring has all eight adapters.
    assert links.seconds("all_to_all", 16, 2, size).value == pytest.approx(size / 2 / 10e9)
    assert links.seconds("all_gather", 16, 2, size).value == pytest.approx(15 / 16 * size / 80e9)
    assert links.seconds("send", 2, 2, size).value == pytest.approx(size / 10e9)
    assert links.seconds("send", 1, 1, size) == (0.0, "measured")


def test_measured_collectives_are_lines_between_sizes_and_scale_between_groups() -> None:
    points = {
        "all_gather": {(2, 1): [(1e3, 1e-4), (1e6, 1.1e-3)], (8, 1): [(1e3, 4e-4), (1e6, 4.4e-3)]}
    }
    network = MeasuredNetwork(points, beyond=GPUS["h100"].network)
    assert network.seconds("all_gather", 2, 1, 1e6) == (1.1e-3, "measured")
    # Halfway between two sizes, halfway between their seconds.
    middle = network.seconds("all_gather", 2, 1, (1e3 + 1e6) / 2)
    assert middle.value == pytest.approx(6e-4) and middle.basis == "interpolated"
    # The line goes on: 1e-3 s for each 999e3 bytes.
    above = network.seconds("all_gather", 2, 1, 2e6)
    assert above.value == pytest.approx(1.1e-3 + 1e-3 * 1e6 / 999e3)
    assert above.basis == "extrapolated"
    # Never below the latency that the smallest size shows.
    assert network.seconds("all_gather", 2, 1, 10).value == pytest.approx(1e-4)
    # Four ranks, from two: each moves 3/4 of the bytes in place of 1/2.
    four = network.seconds("all_gather", 4, 1, 1e6)
    assert four.value == pytest.approx(1.1e-3 * (3 / 4) / (1 / 2)) and four.basis == "interpolated"
    assert network.seconds("all_gather", 16, 1, 1e6).basis == "extrapolated"
    # A collective that was not measured at all is taken from the machine's table, if it has one.
    other = network.seconds("all_to_all", 2, 1, 1e6)
    assert other == GPUS["h100"].network.seconds("all_to_all", 2, 1, 1e6)
    with pytest.raises(ValueError, match="no all_to_all like that of 2 ranks over 1 node"):
        MeasuredNetwork(points, beyond=None).seconds("all_to_all", 2, 1, 1e6)


def test_groups_over_nodes_are_scaled_from_those_with_as_many_ranks_in_each() -> None:
    """What two nodes of eight measure, asked of more: a group with one rank per node has one
    adapter, whatever else was measured."""
    links = Links(300e9, 40e9, inside_latency_s=0, outside_latency_s=0)
    sizes = (1e6, 64e6)
    groups = ((2, 1), (4, 1), (8, 1), (16, 2), (2, 2))
    kinds: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")
    # Kind -> (ranks, nodes) -> (bytes, seconds) of every size.
    points: dict[Any, Any] = {}
    for kind, group in itertools.product(kinds, groups):
        measured = [(size, links.seconds(kind, *group, size).value) for size in sizes]
        points.setdefault(kind, {})[group] = measured
    network = MeasuredNetwork(points, beyond=Links(1.0, 1.0))
    for kind in kinds:
        for ranks, nodes in ((8, 8), (32, 32), (64, 8), (4, 4), (8, 1)):
            found = network.seconds(kind, ranks, nodes, 64e6)
            true = links.seconds(kind, ranks, nodes, 64e6)
            assert found.value == pytest.approx(true.value, rel=0.01), (kind, ranks, nodes)
            # A send is between two ranks, whatever the group; of the others only (8, 1) is in the
            # measurements.
            is_measured = (ranks, nodes) == (8, 1) or kind == "send"
            assert found.basis == ("measured" if is_measured else "extrapolated")
    # Groups with four ranks in each of several nodes were never measured: from ``beyond``, whose
    # links move one byte a second.
    assert network.seconds("all_gather", 8, 2, 64e6).value > 1e6


# A group's ranks stand ``stride`` apart: 8 neighbours fill a node, every eighth rank is alone in
# its own; with 6 per node four neighbours may fit.
@pytest.mark.parametrize(
    ("ranks", "stride", "per_node", "nodes"),
    [
        (8, 1, 8, 1),
        (16, 1, 8, 2),
        (2, 8, 8, 2),
        (8, 2, 8, 2),
        (4, 2, 8, 1),
        (2, 64, 8, 2),
        (4, 1, 6, 1),
        (3, 3, 1, 3),
    ],
)
def test_nodes_of_a_group(ranks: int, stride: int, per_node: int, nodes: int) -> None:
    assert with_ranks_per_node(GPUS["h100"], per_node).nodes_of(ranks, stride) == nodes


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_of_the_table(name: str) -> None:
    gpu = find_machine(name.upper())
    # What it is sold with, by its name, is a little more than a program can have.
    sold = int(gpu.name.split()[-2])
    assert 0.9 * sold < gpu.memory_bytes / 2**30 < sold
    assert gpu.gemm.at(4096, 4096, 4096).basis == "assumed"
    # Attention reaches a smaller part of the peak backward than forward, and a grouped GEMM than a
    # plain one.
    attention = (1, 4096, 32, 4, 128)
    assert gpu.attention_backward.at(*attention).value < gpu.attention.at(*attention).value
    grouped = gpu.grouped_gemm.at(16, 65536, 1536, 2048).value
    assert 5e13 < grouped < gpu.gemm.at(65536, 1536, 2048).value


def calibration(**changes: object) -> dict[str, object]:
    """A calibration as ``megalora bench`` writes it, with one row of each kind."""
    content: dict[str, object] = {
        "format": 1, "name": "CPU", "memory_bytes": 2**33, "ranks_per_node": 2, "world_size": 2,
        "dtype": "float32",
        "when": "2026-11-24", "gemm": [{"rows": 64, "outputs": 32, "inputs": 16, "seconds": 1e-6}],
        "grouped_gemm": [{"experts": 2, "rows": 64, "outputs": 32, "inputs": 16, "seconds": 2e-6}],
        "attention": [{"sequences": 2, "sequence": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
                       "forward_seconds": 1e-5, "backward_seconds": 3e-5}],
        "memory": [{"bytes": 3000, "seconds": 1e-6}],
        "collectives": {"all_gather": [{"ranks": 2, "nodes": 1, "bytes": 1000, "seconds": 1e-4}]},
        "overhead": {"layer_forward_s": 1e-3, "layer_backward_s": 2e-3, "step_s": 5e-3},
    }  # fmt: skip
    return {**content, **changes}


def written(tmp_path: Path, **changes: object) -> Path:
    """A calibration file with other fields; None leaves a field out."""
    path = tmp_path / "machine.json"
    record = {}
    for name, value in calibration(**changes).items():
        if value is not None:
            record[name] = value
    path.write_text(json.dumps(record))
    return path


def test_a_calibration_file(tmp_path: Path) -> None:
    machine = find_machine(str(written(tmp_path)))
    assert machine.gemm.at(64, 32, 16) == (2 * 64 * 32 * 16 / 1e-6, "measured")
    # Scores and sums, 2 FLOPs each, over half of 64 x 64 for causal attention, in 4 heads of 16
    # features of 2 sequences; backward counts as many for its rate.
    flops = 2 * 2 * 64**2 * 4 * 16
    assert machine.attention.at(2, 64, 4, 2, 16).value == pytest.approx(flops / 1e-5)
    assert machine.attention_backward.at(2, 64, 4, 2, 16).value == pytest.approx(flops / 3e-5)
    # 3,000 bytes in a microsecond.
    assert machine.memory.at(3000).value == 3e9
    assert machine.network.seconds("all_gather", 2, 1, 1000).value == 1e-4
    # Host and device are one on a CPU.
    assert machine.overhead.step_s == 5e-3 and not machine.overhead.hidden
    assert "measured 2026-11-24" in machine.note
    assert math.isclose(machine.memory_bytes, 2**33)


def test_a_gpu_measured_alone_takes_the_rest_from_its_table(tmp_path: Path) -> None:
    machine = read_machine(
        written(tmp_path, name="NVIDIA H100 80GB HBM3", collectives={}, overhead=None)
    )
    assert machine.network.seconds("send", 2, 1, 1e6).basis == "assumed"
    assert machine.overhead == GPUS["h100"].overhead
    assert machine.gemm.at(64, 32, 16).basis == "measured"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 7}, "calibration format 7; this megalora reads 1"),
        ({"gemm": None, "memory": None}, "it lacks gemm, memory"),
        ({"overhead": None}, "no overhead of a layer, and no GPU of h100, .* name .CPU."),
        ({"collectives": {"gossip": [{}]}}, "unknown collectives gossip"),
        ({"attention": []}, "has no attention"),
        ({"memory": [{"bytes": 3000}]}, r"in one of its rows: KeyError\('seconds'\)"),
    ],
)
def test_mistakes_in_a_calibration_file(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_machine(written(tmp_path, **changes))


def test_no_machine(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--gpu h1 is neither h100, h200, a100, b200, a100-40gb, .* nor a file"
    ):
        find_machine("h1")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"not a calibration file: .*x\.json:1: not valid JSON"):
        find_machine(str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match="at least 1 GPU, got 0"):
        with_ranks_per_node(GPUS["h100"], 0)


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        # h20 is the beginning of h200, and b200 and b300 are ends of names of racks.
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_device_is_found_by_its_name(device: str, key: str) -> None:
    assert known_gpu(device) is GPUS[key]
    # What a plan calls the machine means the same machine, and so does the word of --gpu.
    assert known_gpu(GPUS[key].name) is GPUS[key]
    assert find_machine(key.upper()) is GPUS[key]


def test_names_of_gpus_are_read_in_any_spelling() -> None:
    assert find_machine("RTX 4090") is find_machine("rtx-4090") is GPUS["rtx4090"]
    assert known_gpu("CPU") is None


def test_no_gpu_is_faster_than_its_data_sheet() -> None:
    """Peaks of dense bfloat16 in TFLOP/s and of memory in TB/s, from data sheets."""
    peaks = {
        "h100": (989, 3.35), "h200": (989, 4.8), "h20": (148, 4.0), "a100": (312, 2.04),
        "a100-40gb": (312, 1.555), "b200": (2250, 8), "b300": (2250, 8), "gb200": (2500, 8),
        "l40s": (362, 0.864), "rtx4090": (165.2, 1.008), "mi300x": (1307.4, 5.3),
    }  # fmt: skip
    assert peaks.keys() == GPUS.keys()
    for key, (flops, memory) in peaks.items():
        gpu = GPUS[key]
        for rate in (gpu.gemm, gpu.grouped_gemm):
            found = rate.at(2**20, 2**20, 2**20)
            # Not so far below that a plan would be of another machine.
            assert 0.5 * flops < found.value / 1e12 < flops and found.basis == "assumed"
        assert 0.8 * memory < gpu.memory.at(1e9).value / 1e12 < memory
        assert gpu.attention.at(1).value > gpu.attention_backward.at(1).value
        assert gpu.note.startswith("assumed: ")
