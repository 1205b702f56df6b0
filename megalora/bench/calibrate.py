"""``megalora bench --calibrate``: measures what the planner's time model needs, on the machine at
hand, into one JSON.

    torchrun --nproc-per-node N -m megalora.bench.calibrate OUT [--dtype bfloat16|float32]
    [--budget-seconds 120]

All ranks measure at the same time, and what is stored of each size is the median on the slowest:
ranks share cores, links and power. Decisions are made on numbers that all ranks agree on, or
collectives would wait for ranks that have gone on.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megalora import host
from megalora.bench.calibrate_cases import COMPUTATIONS, Case, compute_cases
from megalora.bench.calibrate_collectives import COLLECTIVES, collective_cases, cuts
from megalora.bench.calibrate_grid import CPU, GPU, extremes_first, interleaved
from megalora.bench.clock import FLUSH_BYTES, Clock, copies, slowest
from megalora.bench.rows import write_json
from megalora.bench.versions import commit, installed
from megalora.environment import refuse_shared_gpu
from megalora.paths import check_file_to_write, user_path
from megalora.user_error import guarded

type Point = dict[str, int | float]

FORMAT = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BUDGET_SECONDS = 120.0
LEAST_POINTS = 2
"""Of every series: the smallest and the largest size, however little time there is."""
USABLE = 0.8
"""Of the memory that is free: nccl takes buffers as it makes connections."""
PROGRESS_SECONDS = 10


def calibrate(
    out: Path,
    *,
    dtype: str,
    budget_seconds: float = BUDGET_SECONDS,
    say: Callable[[str], None] = print,
) -> None:
    """Measure, and have rank 0 write ``out``, whole or not at all. Every rank of the world calls
    it, inside ``host.process_group()``.

    Args:
        out: the JSON to write; folders above it are made.
        dtype: of operands, ``bfloat16`` or ``float32``.
        budget_seconds: for measuring; the least that there must be, two sizes of every kind, is
            measured whatever it takes.
        say: takes lines of progress on rank 0.

    Raises:
        ValueError: another dtype, no positive budget, an ``out`` that cannot be written, or nodes
            with different numbers of ranks.
    """
    check(out, dtype, budget_seconds)
    rank = dist.get_rank()
    world = dist.get_world_size()
    per_node = ranks_per_node()
    tell = say if rank == 0 else lambda line: None
    cases = _in_order(DTYPES[dtype], world, per_node)
    tell(
        f"calibrating {host.device_name()}, {world} rank{'s' * (world > 1)}, {dtype}: up to"
        f" {len(cases)} sizes in {budget_seconds:.0f} s"
    )
    points = _measure(cases, budget_seconds, tell)
    record = _record(dtype, points, world, per_node)
    if rank == 0:
        write_json(record, out)
    dist.barrier()  # no rank goes on to read what is not there yet
    tell(f"wrote {out}")


def _record(
    dtype: str, points: dict[str, list[Point]], world: int, per_node: int
) -> dict[str, Any]:
    """What the file says: the machine, versions, and points by kind; collective."""
    # imports Megatron, which host.install() must come before
    from megalora.bench.overhead import layer_overhead

    collectives = {name: points.get(name, []) for name in COLLECTIVES} if world > 1 else {}
    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {package: installed(package) for package in ("triton", "megatron-core")}
    return {
        "format": FORMAT, "name": host.device_name(), "memory_bytes": _memory_bytes(per_node),
        "ranks_per_node": per_node,
        "world_size": world, "dtype": dtype,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": found, "commit": commit(),
        **{kind: points.get(kind, []) for kind in COMPUTATIONS},
        "collectives": collectives, "overhead": layer_overhead(dtype),
    }  # fmt: skip


def check(out: Path, dtype: str, budget_seconds: float) -> None:
    """Raises ``ValueError`` as ``calibrate`` does; needs no world."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: {dtype!r} cannot be calibrated; want {' or '.join(DTYPES)}")
    if not budget_seconds > 0:  # nan too
        raise ValueError(
            f"--budget-seconds: {budget_seconds} is no time to measure in; want more than 0, such"
            f" as {BUDGET_SECONDS:.0f}"
        )
    if int(os.environ.get("RANK", 0)):
        return  # rank 0 writes, and other machines may have other folders
    check_file_to_write(out)


def ranks_per_node() -> int:
    """Ranks that torchrun started on each node; without it, all are on one.

    Raises:
        ValueError: their numbers differ.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    most = int(slowest(here))
    least = int(-slowest(-here))
    if most != least:
        raise ValueError(
            f"nodes have from {least} to {most} ranks; calibration needs the same number on each:"
            " set --nproc-per-node"
        )
    return here


def _in_order(dtype: torch.dtype, world: int, per_node: int) -> list[Case]:
    """All sizes that fit, the least of every series first and then the rest, so that time may run
    out anywhere after these."""
    on_gpu = host.device().type == "cuda"
    grid = GPU if on_gpu else CPU
    series = compute_cases(grid, dtype)
    for members in cuts(world, per_node):
        series += collective_cases(members, grid.collective_bytes, dtype)
    free = host.free_memory_bytes() / (1 if on_gpu else per_node)
    room = USABLE * -slowest(-free) - (FLUSH_BYTES if on_gpu else 0)
    fit = [[c for c in cases if _num_copies(c, on_gpu) * c.num_bytes <= room] for cases in series]
    ordered = [extremes_first(cases, lambda case: case.num_bytes) for cases in fit]
    return [case for cases in ordered for case in cases[:LEAST_POINTS]] + interleaved(
        [cases[LEAST_POINTS:] for cases in ordered]
    )


def _num_copies(case: Case, on_gpu: bool) -> int:
    return 1 if case.collective else copies(case.num_bytes, on_gpu)


def _measure(
    cases: Sequence[Case], budget_seconds: float, tell: Callable[[str], None]
) -> dict[str, list[Point]]:
    """Points by kind, sorted; the same on every rank."""
    clock = Clock()
    start = time.monotonic()
    told = 0.0
    done = 0
    found: dict[str, list[Point]] = {}
    taken: Counter[tuple[str, int, int]] = Counter()
    for case in cases:
        elapsed = slowest(time.monotonic() - start)
        if elapsed > budget_seconds and taken[case.series] >= LEAST_POINTS:
            break
        if elapsed - told >= PROGRESS_SECONDS:
            tell(f"  {elapsed:.0f} s: {done} of {len(cases)} sizes")
            told = elapsed
        found.setdefault(case.kind, []).append(_point(case, clock, hurry=elapsed > budget_seconds))
        taken[case.series] += 1
        done += 1
    tell(f"measured {done} of {len(cases)} sizes in {time.monotonic() - start:.0f} s")
    return {
        kind: sorted(points, key=lambda point: list(point.values()))
        for kind, points in found.items()
    }


def _point(case: Case, clock: Clock, hurry: bool) -> Point:
    ring = [case.prepare() for _ in range(_num_copies(case, clock.on_gpu))]
    return case.sizes | {
        key: clock.seconds([calls[key] for calls in ring], collective=case.collective, hurry=hurry)
        for key in ring[0]
    }


def _memory_bytes(per_node: int) -> int:
    return host.memory_bytes() // (1 if host.device().type == "cuda" else per_node)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"bench --calibrate: {message}")


def main(arguments: list[str]) -> None:
    parser = _Parser(prog="torchrun --nproc-per-node N -m megalora.bench.calibrate",
                     description="Measure this machine for megalora plan.")  # fmt: skip
    parser.add_argument("out", type=user_path, help="the JSON to write")
    parser.add_argument(
        "--dtype", help="bfloat16 or float32; default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=BUDGET_SECONDS, help="for measuring"
    )
    options = parser.parse_args(arguments)
    refuse_shared_gpu()
    dtype = options.dtype or ("bfloat16" if host.device().type == "cuda" else "float32")
    check(options.out, dtype, options.budget_seconds)
    with host.process_group():
        calibrate(
            options.out,
            dtype=dtype,
            budget_seconds=options.budget_seconds,
            say=lambda line: print(line, flush=True),
        )


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
