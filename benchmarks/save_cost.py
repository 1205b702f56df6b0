"""Measure what saving costs: the share of time for which the loop stands still, seconds until a
state is on disk, and the first rank's memory in worlds of several sizes.

    python -m benchmarks.save_cost [--folder DISK]

``blocked`` trains a tiny MoE on two ranks with a save every so many steps. ``state`` saves made-up
adapters of Qwen3-30B-A3B (rank 16 on all linears; a layer for each rank: 0.21 GB of float32 state
and 0.035 GB of bfloat16 adapter) with the writer of a run, from worlds of one, two and four ranks.
Ranks are forked and meet over gloo.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch.distributed as dist

import tests.prepare  # noqa: F401  sets up the host before anything from Megatron is imported
from megalora.config import CheckpointConfig
from megalora.parallel import host_group
from megalora.tiny import make_tiny
from megalora.train.checkpoint.background import Background, Save
from megalora.train.checkpoint.save import Beside
from megalora.train.loop import train
from megalora.train.saver import Saver
from megalora.versions import versions
from tests.distributed.ranks import run_ranks
from tests.fixtures import write_chats
from tests.parity.runs import make_config
from tests.train.made_up_state import MadeUpPieces, described, texts_of, writer_of

Json = dict[str, Any]
BLOCKED_GOAL = 0.02
"""Largest share of the time from one save to the next."""
SECONDS_GOAL = 2.0
"""Largest number of seconds for a GB that is written."""
BYTES_PER_ELEMENT = 3 * 4 + 2
"""Of a trained element in a checkpoint: master and moments, and the adapter's file."""
GB = 1e9


def blocked(folder: Path, every: int, saves: int, batch: int) -> Json:
    """How long the loop of a real training stands still, on the rank where that is longest."""
    # The smallest step there is: a real one takes longer, and a save's part of it is less.
    base = make_tiny(folder / "base")
    chats = write_chats(folder / "chats.jsonl")
    # Evaluation is no part of what lies between two saves: at the ends alone.
    config = make_config(
        base, chats, folder / "run", {"ep": 2}, steps=every * (saves + 1), eval=1,
        global_batch_size=batch, micro_batch_size=4,
    )  # fmt: skip
    checkpoint = CheckpointConfig(dir=config.checkpoint.dir, every=every, keep=2)
    config = replace(config, checkpoint=checkpoint)
    of_ranks = run_ranks(_train, 2, config)
    slowest = _over_ranks(max, of_ranks, "blocked_s")
    first = of_ranks[0]
    shares: list[float] = []
    # The last save is at the end: no steps come behind it.
    for number in range(saves):
        between = first["begun"][number + 1] - first["begun"][number]
        shares.append(slowest[number] / between)
    return {
        "ranks": 2, "every": every, "samples_per_step": batch,
        "blocked_s": slowest,
        "share": shares, "median_share": statistics.median(shares),
        "step_s_while_files_are_written": _median(first["beside_s"]),
        "step_s_otherwise": _median(first["alone_s"]),
    }  # fmt: skip


def _over_ranks(of: Callable[[Any], float], of_ranks: list[Json], key: str) -> list[float]:
    """The largest or the sum of a number of all ranks, for each save."""
    return list(map(of, zip(*map(itemgetter(key), of_ranks), strict=True)))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _train(config: Any) -> Json:
    """Train on this rank with a clock around every save and between steps."""
    found: Json = {"begun": [], "blocked_s": [], "beside_s": [], "alone_s": []}
    save = Saver.save
    count_step = Saver.count_step
    last: list[float] = []

    def timed(saver: Saver, now: Any) -> None:
        # Ranks come to a save at different times: waiting for the other is not the save's.
        dist.barrier()
        begun = time.perf_counter()
        save(saver, now)
        found["begun"].append(begun)
        found["blocked_s"].append(time.perf_counter() - begun)
        last.clear()

    def counted(saver: Saver, now: Any) -> None:
        count_step(saver, now)
        # A step that has no step before it has a save there.
        if last:
            # Until the thread is through with its file, it takes time from the step.
            busy = bool(saver.background.pending) and not saver.background.pending[0].done
            found["beside_s" if busy else "alone_s"].append(time.perf_counter() - last[0])
        last[:] = [time.perf_counter()]

    Saver.save = timed
    Saver.count_step = counted
    train(config)
    return found


def state(folder: Path, world: int, repeats: int, *, layers: int, tiny: bool) -> Json:
    """Save a state of ``layers`` layers for each rank some times over."""
    run = folder / f"world_{world}"
    run.mkdir()
    model = described(layers * world, tiny=tiny)
    of_ranks = run_ranks(_save, world, run, model, repeats)
    gb = model.num_elements * BYTES_PER_ELEMENT / GB
    # A save is over when its slowest rank is.
    seconds = _over_ranks(max, of_ranks, "seconds")
    cpu_s = _over_ranks(sum, of_ranks, "cpu_s")
    return {
        "world": world, "gb": gb, "elements": model.num_elements,
        "blocked_s": _over_ranks(max, of_ranks, "blocked_s"),
        "seconds": seconds, "seconds_per_gb": min(seconds) / gb,
        # What the processors did, whatever else ran beside: without waits for disk and peers.
        "cpu_s_of_all_ranks": cpu_s, "cpu_seconds_per_gb": min(cpu_s) / gb,
        "median_seconds_per_gb": statistics.median(seconds) / gb,
        "snapshot_bytes": of_ranks[0]["snapshot_bytes"],
        "first_rank_peak_beside_snapshots_bytes": of_ranks[0]["beside_bytes"],
        "peaks_beside_snapshots_bytes": list(map(itemgetter("beside_bytes"), of_ranks)),
    }  # fmt: skip


def _save(run: Path, model: Any, repeats: int) -> Json:
    pieces = MadeUpPieces(model, dist.get_rank(), dist.get_world_size())
    found: Json = {"seconds": [], "blocked_s": [], "cpu_s": []}
    with host_group() as group:
        writer = writer_of(run, model, pieces, group, keep=1)
        background = Background(print)
        before = _memory_bytes("VmRSS")
        # Lets the system count the peak anew.
        Path("/proc/self/clear_refs").write_text("5")
        held = 0
        for step in range(1, repeats + 1):
            dist.barrier()
            begun = time.perf_counter()
            cpu_begun = time.process_time()
            snapshot = background.snapshot(step)
            fresh = snapshot.num_bytes == 0
            writer.take(snapshot, Beside())
            found["blocked_s"].append(time.perf_counter() - begun)
            texts = texts_of(writer, step)
            save = Save(step, lambda s=snapshot, t=texts: writer.write(s, t), snapshot)
            background.begin(save)
            # Here a run trains. Two saves at once would make one another's time.
            background.finish()
            found["seconds"].append(time.perf_counter() - begun)
            found["cpu_s"].append(time.process_time() - cpu_begun)
            assert save.error is None, save.error
            held += snapshot.num_bytes * fresh
    found["snapshot_bytes"] = held
    found["beside_bytes"] = _memory_bytes("VmHWM") - before - held
    return found


def _memory_bytes(name: str) -> int:
    """This process's memory, by its name in the system's table."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def goals(record: Json) -> list[str]:
    """A line for each goal: met or missed."""
    share = record["blocked"]["median_share"]
    largest = record["state"][-1]
    one = record["state"][0]["first_rank_peak_beside_snapshots_bytes"]
    many = largest["first_rank_peak_beside_snapshots_bytes"]
    return [
        f"{_word(share <= BLOCKED_GOAL)}: the loop stands still for {100 * share:.2f} % of the time"
        f" from one save to the next (goal {100 * BLOCKED_GOAL:.0f} %)",
        f"{_word(largest['seconds_per_gb'] <= SECONDS_GOAL)}: {largest['gb']:.2f} GB on"
        f" {largest['world']} ranks at {largest['seconds_per_gb']:.2f} s/GB"
        f" (goal {SECONDS_GOAL:.1f}; median {largest['median_seconds_per_gb']:.2f});"
        f" {largest['cpu_seconds_per_gb']:.2f} s of processors per GB, of all ranks together",
        f"first rank beside its snapshots: {one / 2**20:.0f} MiB alone,"
        f" {many / 2**20:.0f} MiB among {largest['world']} with as many times the state",
    ]


def _word(met: bool) -> str:
    return "met" if met else "missed"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step of the training")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1, help="of the state, for each rank")
    parser.add_argument("--tiny", action="store_true", help="a state of next to nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/save_cost.json"))
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    record: Json = {
        "benchmark": "save_cost",
        "command": " ".join(["python -m benchmarks.save_cost", *given]),
        "versions": versions(),
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        record["blocked"] = blocked(folder, options.every, options.saves, options.batch)
        record["state"] = []
        # As many times the state, so that whatever the first rank gathers would show.
        for world in (1, 2, 4):
            record["state"].append(
                state(folder, world, options.repeats, layers=options.layers, tiny=options.tiny)
            )
    record["load_average_after"] = os.getloadavg()[0]
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for line in [*goals(record), f"wrote {options.out}"]:
        print(line)


if __name__ == "__main__":
    main()
