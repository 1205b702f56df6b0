"""Find the machine to plan for: a well-known GPU, or a file that ``megalora bench --calibrate``
wrote."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalora.config.checks import require
from megalora.json_text import read_json
from megalora.paths import expand
from megalora.planner.hardware import (
    KINDS,
    Machine,
    MeasuredNetwork,
    Overhead,
    Rate,
    Table,
)
from megalora.planner.known_gpus import GPUS, known_gpu


def find_machine(name: str) -> Machine:
    """The GPU of that name, or the machine a calibration file describes; raises ``ValueError``."""
    # "RTX 4090", "rtx-4090" and "rtx4090" are one card.
    for key, machine in GPUS.items():
        if _letters(name) == _letters(key):
            return machine
    # Not one of ours: the path of a calibration file.
    path = Path(expand(name, "--gpu"))
    if not path.is_file():
        raise ValueError(
            f"--gpu {name} is neither {', '.join(GPUS)} nor a file; megalora bench --calibrate FILE"
            " measures this machine"
        )
    return read_machine(path)


def read_machine(path: Path) -> Machine:
    """A calibration file as a machine.

    What it lacks comes from the table of the GPU that its name contains, such as collectives when
    one GPU was measured. Raises ``ValueError`` that names the file and what is missing.
    """
    content = _read(path)
    unknown = sorted(set(content["collectives"]) - set(KINDS))
    require(not unknown, f"{path}: unknown collectives {', '.join(unknown)}")
    try:
        return _machine(content, path)
    # A row without one of its sizes, or with a word where a number belongs.
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a calibration file; in one of its rows: {error!r}") from None


def _machine(content: dict[str, Any], path: Path) -> Machine:
    """A machine from a file whose keys are known to be there."""
    name = content["name"]
    like = known_gpu(name)
    groups = {}
    for kind, rows in content["collectives"].items():
        # A kind without rows was not measured: the table of a GPU like it answers.
        if rows:
            groups[kind] = _groups(rows)
    gemm = ("rows", "outputs", "inputs")
    attention = ("sequences", "sequence", "heads", "kv_heads", "head_dim")
    return Machine(
        name=name,
        memory_bytes=content["memory_bytes"],
        ranks_per_node=content["ranks_per_node"],
        gemm=_table(content, "gemm", gemm, _gemm_flops),
        grouped_gemm=_table(content, "grouped_gemm", ("experts", *gemm), _gemm_flops),
        attention=_table(content, "attention", attention, _attention_flops, "forward_seconds"),
        attention_backward=_table(
            content, "attention", attention, _attention_flops, "backward_seconds"
        ),
        memory=_table(content, "memory", ("bytes",), lambda row: row["bytes"]),
        network=MeasuredNetwork(groups, beyond=like.network if like else None),
        overhead=_overhead(content, path, like),
        dtype=content["dtype"],
        note=(
            f"measured {content['when']} ({path.name}), {content['dtype']}, {content['world_size']}"
            " ranks"
        ),
    )


def _letters(name: str) -> str:
    """The letters and digits of a name, in small letters."""
    return "".join(filter(str.isalnum, name.lower()))


def _overhead(content: dict[str, Any], path: Path, like: Machine | None) -> Overhead:
    """The host's time as measured, else that of the GPU that is like it."""
    measured = content.get("overhead")
    name = content["name"]
    if measured:
        return Overhead(**measured, hidden="cpu" not in name.lower(), basis="measured")
    if like is None:
        raise ValueError(
            f"{path} has no overhead of a layer, and no GPU of {', '.join(GPUS)} is part of the"
            f" name {name!r} to take it from; calibrate this machine anew"
        )
    return like.overhead


_NEEDED = (
    "format", "name", "memory_bytes", "ranks_per_node", "world_size", "dtype", "when",
    "collectives", "gemm", "grouped_gemm", "attention", "memory",
)  # fmt: skip
"""Keys that every calibration file has."""


def _read(path: Path) -> dict[str, Any]:
    """The content of a calibration file, with its keys and its format checked."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"not a calibration file: {error}") from None
    # A list or a number is JSON too; it has none of the keys.
    there = content if isinstance(content, dict) else {}
    missing = [key for key in _NEEDED if key not in there]
    require(not missing, f"{path}: not a calibration file; it lacks {', '.join(missing)}")
    require(
        content["format"] == 1,
        f"{path}: calibration format {content['format']}; this megalora reads 1",
    )
    return content


def _gemm_flops(row: Mapping[str, float]) -> float:
    return 2 * row["rows"] * row["outputs"] * row["inputs"]


def _attention_flops(row: Mapping[str, float]) -> float:
    return attention_flops(row["sequences"], row["sequence"], row["heads"] * row["head_dim"])


def attention_flops(sequences: float, sequence: float, width: float) -> float:
    """FLOPs of causal attention forward: scores and values over half of the square, 2 S^2 width for
    each sequence."""
    return 2 * sequences * sequence**2 * width


def _table(
    content: Mapping[str, Any], kind: str, sizes: tuple[str, ...], work: Any,
    seconds: str = "seconds"
) -> Rate:  # fmt: skip
    """Rates of one kind of work: ``work(row)`` per second, at the ``sizes`` of each row."""
    rows = content[kind]
    require(bool(rows), f"the calibration of {content['name']} has no {kind}")
    points = []
    for row in rows:
        where = tuple(row[size] for size in sizes)
        points.append((where, work(row) / row[seconds]))
    return Table(tuple(points))


def _groups(rows: list[dict[str, float]]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """(ranks, nodes) -> (bytes, seconds) of the sizes measured in such a group, ascending."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in rows:
        group = (int(row["ranks"]), int(row["nodes"]))
        found.setdefault(group, []).append((row["bytes"], row["seconds"]))
    # Ascending: MeasuredNetwork draws lines between neighbours.
    for points in found.values():
        points.sort()
    return found


def with_ranks_per_node(machine: Machine, ranks: int) -> Machine:
    """The same GPUs, ``ranks`` of them in a node."""
    require(ranks >= 1, f"a node has at least 1 GPU, got {ranks}")
    return replace(machine, ranks_per_node=ranks)
