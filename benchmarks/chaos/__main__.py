"""Inject faults of every kind and count what is lost (``make chaos``).

    python -m benchmarks.chaos [--quick] [--kinds KIND,KIND] [--times N] [--go-on] [--out FILE]

Writes each fault with its result to JSON, behind each kind, and prints a table. A second call with
other kinds adds to the file; ``--go-on`` does what a call that was cut off has left to do. The exit
code is 1 when something in the file was lost, hung, or left behind.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import megalora.train.loop  # noqa: F401  here, and in no forked rank again
import tests.prepare  # noqa: F401  sets up the host before anything from Megatron is imported
from benchmarks.chaos import damage, fuzz, hostile, ranks, restarts, saves, warm
from benchmarks.chaos.fault import HANG, LOST, Fault
from benchmarks.chaos.fuzz_targets import CORPUS
from benchmarks.chaos.held_run import HeldRun, held_run
from benchmarks.chaos.scene import Scene, make_scene
from benchmarks.chaos.table import rows_of, table_of
from benchmarks.harness import save

SEED = 21
FUZZ_S = 3
"""Seconds on each target of fuzzing, times the kind's number."""
MEMORY = Path("/dev/shm")
"""A folder in memory, where forcing to disk takes no time. A killed process leaves the same."""


class Kind:
    """Something that is done to many runs."""

    def __init__(
        self, run: Callable[..., Iterator[Fault]], times: int | None, quick: int,
        holds: bool = True,
    ) -> None:  # fmt: skip
        """
        Args:
            run: (held run or scene, scratch folder, times or every how many-th point).
            times: number of faults; None where all points are tried.
            quick: the same with ``--quick``; of points, each so many-th.
            holds: whether it is done to a run that this process holds.
        """
        self.run = run
        self.times = times
        self.quick = quick
        self.holds = holds

    def number(self, options: argparse.Namespace) -> int:
        """The number that ``run`` gets."""
        if options.quick:
            return self.quick
        return 1 if self.times is None else options.times or self.times


def _restarts(scene: Scene, scratch: Path, times: int) -> Iterator[Fault]:
    for command in restarts.COMMANDS:
        yield from restarts.kill_again_and_again(command, scene, times, SEED)


def _warm(scene: Scene, scratch: Path, times: int) -> Iterator[Fault]:
    yield from warm.kill_again_and_again(scene, times, SEED)


def _ranks(scene: Scene, scratch: Path, times: int) -> Iterator[Fault]:
    faults = ["kill"] * times
    # Those that take half a minute each, in between.
    for place, fault in enumerate(("stop", "hold", "end") * max(1, times // 12)):
        faults.insert(3 * place + 1, fault)
    yield from ranks.disturbed(scene, faults, SEED)


def _hostile(scene: Scene, scratch: Path, times: int) -> Iterator[Fault]:
    yield from hostile.hostile_inputs(scratch, quick=times == 1)


def _fuzz(scene: Scene, scratch: Path, times: int) -> Iterator[Fault]:
    yield from fuzz.fuzzed(CORPUS, scratch, FUZZ_S * times)


def _by_chance(function: Callable[..., Iterator[Fault]]) -> Callable[..., Iterator[Fault]]:
    return lambda held, scratch, times: function(held, scratch, times, SEED)


KINDS = {
    "restarts": Kind(_restarts, 10, 1, holds=False),
    "warm": Kind(_warm, 10, 1, holds=False),
    "ranks": Kind(_ranks, 24, 1, holds=False),
    "hostile": Kind(_hostile, 2, 1, holds=False),
    "fuzz": Kind(_fuzz, 10, 1, holds=False),
    "crash-points": Kind(saves.crash_points, None, 6),
    "cut-writes": Kind(_by_chance(saves.cut_writes), 40, 4),
    "disk-errors": Kind(saves.disk_errors, None, 8),
    "full-disks": Kind(_by_chance(saves.full_disks), 20, 4),
    "removed-folders": Kind(saves.removed_folders, None, 8),
    "checkpoints": Kind(_by_chance(damage.damaged_checkpoints), 264, 22),
    "torn": Kind(lambda held, scratch, times: damage.torn_checkpoints(held, scratch), None, 1),
    "inputs": Kind(_by_chance(damage.damaged_inputs), 36, 6),
    "configs": Kind(_by_chance(damage.damaged_configs), 36, 6),
}


def inject(options: argparse.Namespace, keep: Callable[[list[Fault], list[str]], None]) -> None:
    """Inject all faults of the kinds that were asked for; ``keep`` gets those so far, and the kinds
    that are done."""
    faults: list[Fault] = []
    done: list[str] = []
    begun = time.monotonic()

    # Kinds share one list, so that a crash of the driver loses no result.
    def note(name: str, made: Scene, what: Scene | HeldRun) -> None:
        kind = KINDS[name]
        for fault in kind.run(what, made.run("scratch"), kind.number(options)):
            faults.append(fault)
            if is_wrong(fault):
                print(f"{fault.result}: {fault}", flush=True)
            if len(faults) % 50 == 0:
                keep(faults, done)
        done.append(name)
        print(f"{name}: {len(faults)} faults, {time.monotonic() - begun:.0f} s", flush=True)
        keep(faults, done)

    # Ranks are forked before this process has a world of its own.
    for name in options.kinds:
        if not KINDS[name].holds:
            with tempfile.TemporaryDirectory() as folder:
                made = make_scene(Path(folder))
                note(name, made, made)
    held_kinds = [name for name in options.kinds if KINDS[name].holds]
    if held_kinds:
        # Each fault forces its files to disk, which a real disk takes time for.
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            made = make_scene(Path(folder))
            with held_run(made) as held:
                for name in held_kinds:
                    note(name, made, held)


def is_wrong(fault: Fault) -> bool:
    """Whether something was lost, hangs, or was left behind."""
    return fault.result in (LOST, HANG) or bool(fault.left_over)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few faults of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--times", type=int, help="faults of each kind that is drawn by chance")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/chaos.json"))
    parser.add_argument("--go-on", action="store_true", help="only kinds that the file has not")
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    if unknown := set(options.kinds) - KINDS.keys():
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}; choose from {', '.join(KINDS)}")

    # Kinds of earlier calls with the same file stay, unless this one injects all kinds.
    earlier: list[Fault] = []
    commands: list[str] = []
    done: list[str] = []
    if options.out.exists() and (options.go_on or set(options.kinds) != KINDS.keys()):
        record = json.loads(options.out.read_text())
        earlier = [Fault(**fault) for fault in record["faults"]]
        commands = record["commands"]
        done = record["done"]
    if options.go_on:
        options.kinds = [name for name in options.kinds if name not in done]
    command = f"python -m benchmarks.chaos {' '.join(sys.argv[1:])}".strip()
    commands = [*dict.fromkeys([*commands, command])]

    every = list(earlier)

    def keep(faults: list[Fault], done_now: list[str]) -> None:
        # What a call that was cut off has of a kind is injected again.
        anew = {fault.kind for fault in faults}
        every[:] = [fault for fault in earlier if fault.kind not in anew] + faults
        in_full = [asdict(fault) for fault in every]
        kinds_done = [*dict.fromkeys([*done, *done_now])]
        save(
            "chaos", rows_of(every), options.out, commands=commands, done=kinds_done, faults=in_full
        )

    inject(options, keep)
    print(table_of(rows_of(every)))
    sys.exit(1 if any(map(is_wrong, every)) else 0)


if __name__ == "__main__":
    main()
