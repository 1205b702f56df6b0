"""Measure the rates that the planner's time model needs, on the machine at hand, into one JSON.

This is ``megalora bench --calibrate``, or:

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
from megalora.bench.calibrate_collectives import COLLECTIVES, Collectives, cuts
from megalora.bench.calibrate_config import ForConfig, config_cases, left_out
from megalora.bench.calibrate_grid import CPU, GPU, extremes_first, interleaved
from megalora.bench.clock import FLUSH_BYTES, Clock, copies, slowest
from megalora.bench.rows import write_json
from megalora.config.file import load_config
from megalora.environment import refuse_shared_gpu
from megalora.paths import check_file_to_write, user_path
from megalora.user_error import guarded
from megalora.versions import commit, installed

type Point = dict[str, int | float]

FORMAT = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BUDGET_SECONDS = 120.0
LEAST_POINTS = 2
"""Points taken of every series, however little time there is: the smallest and the largest."""
USABLE = 0.8
"""Share of the free memory to use; NCCL allocates buffers as it makes connections."""
PROGRESS_SECONDS = 10


def calibrate(
    out: Path,
    *,
    dtype: str,
    budget_seconds: float = BUDGET_SECONDS,
    config: ForConfig | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Measure, and have rank 0 write ``out``, whole or not at all. Every rank of the world calls
    it, inside ``host.process_group()``.

    Args:
        out: the JSON to write; folders above it are made.
        dtype: dtype of the operands, ``bfloat16`` or ``float32``.
        budget_seconds: time for measuring; two sizes of every kind are measured whatever that
            takes.
        config: measure the sizes that its plan asks for. None: a grid of usual sizes.
        say: takes lines of progress on rank 0.

    Raises:
        ValueError: another dtype, no positive budget, an ``out`` that cannot be written, nodes with
            different numbers of ranks, or a config that cannot be planned.
    """
    check(out, dtype, budget_seconds)
    rank = dist.get_rank()
    world = dist.get_world_size()
    per_node = ranks_per_node()
    tell = say if rank == 0 else lambda line: None
    cases = _in_order(DTYPES[dtype], world, per_node, config, tell)
    tell(
        f"calibrating {host.device_name()}, {world} rank{'s' * (world > 1)}, {dtype}: up to"
        f" {len(cases)} sizes in {budget_seconds:.0f} s"
    )
    points = _measure(cases, budget_seconds, tell)
    record = _record(dtype, points, world, per_node)
    if rank == 0:
        write_json(record, out)
    # No rank may go on and read the file before it is there.
    dist.barrier()
    tell(f"wrote {out}")


def _record(
    dtype: str, points: dict[str, list[Point]], world: int, per_node: int
) -> dict[str, Any]:
    """What the file says: the machine, versions, and points by kind; collective."""
    # Imports Megatron, which must come after host.install().
    from megalora.bench.overhead import layer_overhead

    versions = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "megatron-core": installed("megatron-core"),
    }
    record: dict[str, Any] = {
        "format": FORMAT,
        "name": host.device_name(),
        "memory_bytes": _memory_bytes(per_node),
        "ranks_per_node": per_node,
        "world_size": world,
        "dtype": dtype,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "commit": commit(),
    }
    # A kind of which no size fits into memory has an empty list, so that readers find every key.
    for kind in COMPUTATIONS:
        record[kind] = points.get(kind, [])
    record["collectives"] = {}
    # One rank alone has nobody to communicate with.
    if world > 1:
        for name in COLLECTIVES:
            record["collectives"][name] = points.get(name, [])
    record["overhead"] = layer_overhead(dtype)
    return record


def check(out: Path, dtype: str, budget_seconds: float) -> None:
    """Raise ``ValueError`` as ``calibrate`` does; needs no world."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: {dtype!r} cannot be calibrated; want {' or '.join(DTYPES)}")
    # Not ``<= 0``, which is false of nan.
    if not budget_seconds > 0:
        raise ValueError(
            f"--budget-seconds: {budget_seconds} leaves no time to measure; want more than 0, such"
            f" as {BUDGET_SECONDS:.0f}"
        )
    # Only rank 0 writes; other machines may have other folders.
    if int(os.environ.get("RANK", 0)) == 0:
        check_file_to_write(out)


def ranks_per_node() -> int:
    """Ranks that torchrun started on each node; without it, all are on one.

    Raises:
        ValueError: their numbers differ.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    # ``slowest`` is a maximum over all ranks, and min(x) = -max(-x).
    most = int(slowest(here))
    least = int(-slowest(-here))
    if most != least:
        raise ValueError(
            f"nodes have from {least} to {most} ranks; calibration needs the same number on each:"
            " set --nproc-per-node"
        )
    return here


def _in_order(
    dtype: torch.dtype, world: int, per_node: int, config: ForConfig | None,
    tell: Callable[[str], None],
) -> list[Case]:  # fmt: skip
    """All sizes that fit, the least of every series first and then the rest, so that time may run
    out anywhere after these. Of a config's, both are in the order in which layouts need them; the
    grid adds its least of every series that the config does without."""
    on_gpu = host.device().type == "cuda"
    grid = GPU if on_gpu else CPU
    groups = [Collectives(members, dtype) for members in cuts(world, per_node)]
    series = compute_cases(grid, dtype)
    for group in groups:
        series += group.series(grid.collective_bytes)
    room = _room(on_gpu, per_node)

    def fits(case: Case) -> bool:
        return _num_copies(case, on_gpu) * case.num_bytes <= room

    first: list[Case] = []
    rest: list[Case] = []
    if config is not None:
        asked = config.sizes(_memory_bytes(per_node), per_node)
        wanted = config_cases(asked, {(g.ranks, g.nodes): g for g in groups}, dtype)
        if too_large := [case for case in wanted if not fits(case)]:
            tell(left_out(too_large, wanted, "for lack of memory"))
        taken: Counter[tuple[str, int, int]] = Counter()
        for case in filter(fits, wanted):
            taken[case.series] += 1
            (first if taken[case.series] <= LEAST_POINTS else rest).append(case)
        series = [cases for cases in series if cases[0].series not in taken]
    of_grid: list[list[Case]] = []
    for cases in series:
        ordered = extremes_first(list(filter(fits, cases)), lambda case: case.num_bytes)
        first += ordered[:LEAST_POINTS]
        of_grid.append(ordered[LEAST_POINTS:])
    return first + (interleaved(of_grid) if config is None else rest)


def _room(on_gpu: bool, per_node: int) -> float:
    """Bytes that the operands of one size may take, the same on every rank; collective."""
    free = host.free_memory_bytes()
    if not on_gpu:
        # The ranks of a node share its memory.
        free /= per_node
    # The rank with the least free memory decides for all: min(x) = -max(-x).
    room = USABLE * -slowest(-free)
    if on_gpu:
        # The clock's own buffer, which empties the cache.
        room -= FLUSH_BYTES
    return room


def _num_copies(case: Case, on_gpu: bool) -> int:
    """Sets of operands of a case: one for a collective, which depends on links, not on caches."""
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
        # All ranks must end at the same case, so the slowest one's clock decides.
        elapsed = slowest(time.monotonic() - start)
        # The least of every series stands first, so nothing behind this one is still needed.
        if elapsed > budget_seconds and taken[case.series] >= LEAST_POINTS:
            break
        if elapsed - told >= PROGRESS_SECONDS:
            tell(f"  {elapsed:.0f} s: {done} of {len(cases)} sizes")
            told = elapsed
        found.setdefault(case.kind, []).append(_point(case, clock, hurry=elapsed > budget_seconds))
        taken[case.series] += 1
        done += 1
    tell(f"measured {done} of {len(cases)} sizes in {time.monotonic() - start:.0f} s")
    if left := [case for case in cases[done:] if case.needed_by]:
        tell(left_out(left, cases, "for lack of time"))
    for points in found.values():
        # Sizes come before seconds in a point, so this sorts by the sizes.
        points.sort(key=lambda point: list(point.values()))
    return found


def _point(case: Case, clock: Clock, hurry: bool) -> Point:
    """The sizes of a case, and the seconds of each of its calls; collective."""
    # Every set of operands has its own calls, by their keys: forward_seconds, backward_seconds ...
    ring = [case.prepare() for _ in range(_num_copies(case, clock.on_gpu))]
    point: Point = dict(case.sizes)
    for key in ring[0]:
        calls = [calls_by_key[key] for calls_by_key in ring]
        point[key] = clock.seconds(calls, collective=case.collective, hurry=hurry)
    return point


def _memory_bytes(per_node: int) -> int:
    """Memory of one rank: its GPU's, or its share of the node's."""
    if host.device().type == "cuda":
        return host.memory_bytes()
    return host.memory_bytes() // per_node


class _Parser(argparse.ArgumentParser):
    """Raises its errors, so that ``guarded`` says them in one line on one rank."""

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
    parser.add_argument("--config", type=user_path, help="measure the sizes that its plan asks for")
    parser.add_argument("--imbalance", type=float, default=1.2, help="as plan will be told")
    parser.add_argument("overrides", nargs="*", help="options of the config")
    options = parser.parse_args(arguments)
    refuse_shared_gpu()
    dtype = options.dtype or ("bfloat16" if host.device().type == "cuda" else "float32")
    config = None
    if options.config:
        config = ForConfig(load_config(options.config, options.overrides), options.imbalance)
        dtype = config.config.model.dtype
    check(options.out, dtype, options.budget_seconds)
    with host.process_group():
        calibrate(
            options.out,
            dtype=dtype,
            budget_seconds=options.budget_seconds,
            config=config,
            say=lambda line: print(line, flush=True),
        )


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
