"""Compare training steps of megalora and of its peers on one model, in one run: the same weights,
tokens and routing.

    python -m benchmarks.peers --budget-seconds 180 --out benchmarks/results/peers_cpu.json

Arms: megalora; Megatron-Bridge's LoRA, with an adapter per expert and as its default (one for all
    experts); stock PEFT on transformers; torch's grouped_mm composed; Unsloth where it is
    installed. An arm whose packages are missing is a row that says so. Each has a process; they
    step in turns in many short rounds, and a ratio is between two steps of one round.

Before anything is timed, losses must agree: the first loss of all arms, which is the base's, and
all losses of those that train the same factors. If one differs, no times are given and the exit
code is 1.
"""

import argparse
import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import NEEDS_GPU, Budget, earlier, save
from benchmarks.peer_case import CPU_SHAPES, DRY_SHAPES, GPU_SHAPES, Shape
from benchmarks.peer_rows import check_losses, ratios, show, timed, without_times
from benchmarks.peer_worker import ARMS, ArmFailed, Sample, work

REFERENCE = "megalora"
CUT_OFF = ("stopped", "not reached")
"""Beginnings of the status of an arm that a second call runs again."""
PROOF_STEPS = 5
"""Steps whose losses are compared."""
LEAST_SECONDS = 15.0
"""Seconds without which a pair on a GPU is not begun."""
ROUNDS = {"cpu": 60, "cuda": 12}
"""Largest number of rounds; a processor's times vary by far more than a GPU's."""
PRELOADED = (
    "megalora.model.hf_weights",
    "benchmarks.bridge_model",
    "benchmarks.peer_megatron",
    "peft",
)
"""Modules that the workers of a CPU run inherit by forking instead of importing them one by one;
the first makes Bridge importable."""


class Worker:
    """The process of an arm and the connection to it; ended when the block ends."""

    def __init__(self, name: str, setup: Any, threads: int, budget: Budget) -> None:
        self.name = name
        self.budget = budget
        self.built = False
        # CUDA cannot be used in a forked process, and Unsloth wants to be imported before
        # transformers.
        how = "spawn" if setup.device.type == "cuda" or name == "unsloth" else "fork"
        context: Any = multiprocessing.get_context(how)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, name, setup, threads), daemon=True
        )
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()
        self.process.join(timeout=2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def tell(self, command: str, argument: Any = None) -> None:
        # A worker that has ended has left its last words in the pipe, which ``hear`` reads.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send((command, argument))

    def hear(self) -> Any:
        """The worker's answer.

        Raises:
            ArmFailed: it cannot go on, has ended, or has not answered in time.
        """
        # A pipe takes no infinite timeout; without a budget it is None, which waits for ever.
        left = self.budget.left()
        timeout_s = None if left == float("inf") else max(1.0, left)
        try:
            if not self.connection.poll(timeout_s):
                raise ArmFailed("stopped: out of time")
            kind, answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(timeout=5)
            raise ArmFailed(f"cannot run: its process ended with {self.process.exitcode}") from None
        if kind == "failed":
            raise ArmFailed(answer)
        return answer

    def ask(self, command: str, argument: Any = None) -> Any:
        self.tell(command, argument)
        return self.hear()


class Comparison:
    """One shape: rows by arm, filled as far as time allows."""

    def __init__(self, shape: Shape, rows: dict[str, dict[str, Any]], rounds: int) -> None:
        self.shape = shape
        self.rows = rows
        self.rounds = rounds
        self.wrong: list[str] = []

    def missing(self) -> list[str]:
        """Arms without a final row."""
        names = []
        for name in ARMS:
            if name not in self.rows or self.rows[name]["status"].startswith(CUT_OFF):
                names.append(name)
        return names

    def run(self, workers: Sequence[Worker], budget: Budget) -> None:
        """Build these arms, compare their losses, and time them if all agree."""
        ready: dict[str, Worker] = {}
        for worker in workers:
            # The reference, which was built for an earlier pair.
            if worker.built:
                ready[worker.name] = worker
                continue
            worker.built = True
            worker.tell("build")
            self._row(worker, ready, lambda w: {**w.hear(), "losses": w.ask("prove", PROOF_STEPS)})
        if REFERENCE not in ready:
            for worker in ready.values():
                self.rows[worker.name]["status"] = f"not reached: {REFERENCE} cannot run"
            return
        self.wrong += check_losses(self.rows, list(ready), REFERENCE, self._dtype())
        # The speed of another computation would mislead.
        if self.wrong:
            return
        for worker in list(ready.values()):
            if "peak_bytes" not in self.rows[worker.name]:
                self._row(worker, ready, lambda w: {"peak_bytes": w.ask("peak")})
        samples = self._take_turns(ready, budget)
        # Without the reference there is nothing to divide by; its row says why it is missing.
        if REFERENCE not in samples:
            for name in samples:
                self.rows[name]["status"] = f"not reached: {REFERENCE} did not take its turns"
            return
        on_gpu = self._dtype() == torch.bfloat16
        for name, taken in samples.items():
            self.rows[name] |= ratios(taken, samples[REFERENCE])
            if on_gpu and "step_ms" not in self.rows[name]:
                self.rows[name] |= timed(taken)

    def _row(self, worker: Worker, ready: dict[str, Worker], ask: Any) -> None:
        """Add what ``ask`` finds to the worker's row; one that fails is out."""
        row = self.rows.setdefault(worker.name, {"arm": worker.name})
        try:
            row |= {"status": "ok", **ask(worker)}
            ready[worker.name] = worker
        except ArmFailed as failed:
            row["status"] = str(failed)
            ready.pop(worker.name, None)

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.shape in GPU_SHAPES else torch.float32

    def _take_turns(self, ready: dict[str, Worker], budget: Budget) -> dict[str, list[Sample]]:
        """Take rounds of one step each, in an order that is reversed every other round; the first
        does not count."""
        samples: dict[str, list[Sample]] = {name: [] for name in ready}
        for number in range(self.rounds + 1):
            begun = budget.left()
            took: dict[str, Sample] = {}
            # Reversed every other round: an arm finds the caches as the one before it left them.
            direction = 1 if number % 2 == 0 else -1
            for name in list(ready)[::direction]:
                try:
                    took[name] = ready[name].ask("turn")
                except ArmFailed as failed:
                    self.rows[name]["status"] = str(failed)
                    del ready[name], samples[name]
            if number > 0:
                for name, sample in took.items():
                    samples[name].append(sample)
            # Three rounds at least: a median of fewer says nothing.
            if number >= 3 and budget.left() < 2 * (begun - budget.left()):
                break
        # An arm may have ended in the first round, which does not count.
        return {name: taken for name, taken in samples.items() if taken}


def groups(missing: list[str], on_gpu: bool) -> list[list[str]]:
    """Groups of arms that take turns with each other, each with the reference: on a GPU pairs,
    because of its memory."""
    others = [name for name in missing if name != REFERENCE]
    if not on_gpu:
        # All at once: host memory holds every model of a CPU's shapes.
        return [[REFERENCE, *others]] if missing else []
    return [[REFERENCE, name] for name in others]


def compare(
    shape: Shape,
    comparison: Comparison,
    device: torch.device,
    threads: int,
    budget: Budget,
    keep: Any,
) -> None:
    """Run what is missing of one shape; ``keep()`` is called whenever rows have been added."""
    on_gpu = device.type == "cuda"
    planned = groups(comparison.missing(), on_gpu)
    least_s = LEAST_SECONDS if on_gpu else 1
    setup = shape.setup(device, torch.bfloat16 if on_gpu else torch.float32)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for number, group in enumerate(planned):
            if budget.left() < least_s:
                for name in group:
                    comparison.rows.setdefault(
                        name, {"arm": name, "status": "not reached: out of time"}
                    )
                continue
            # The next pair imports while this one is measured; all at once would take its cores.
            for near in planned[number : number + 2]:
                for name in near:
                    if name not in workers:
                        worker = Worker(name, setup, threads, budget)
                        workers[name] = stack.enter_context(worker)
            comparison.run([workers[name] for name in group], budget)
            keep()
            for name in group[1:]:
                # Its memory is the next one's.
                workers[name].__exit__()
            if comparison.wrong:
                break


def plan(device: torch.device, args: argparse.Namespace) -> tuple[Sequence[Shape], dict[str, Any]]:
    """Shapes to compare at, and the settings that a record is continued under."""
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    rounds = ROUNDS[device.type]
    times = "ratios of steps in one round"
    if args.dry:
        shapes = DRY_SHAPES
        rounds = 3
        times = "mean nothing: a dry run"
    settings = {
        "times": times,
        "threads": args.threads,
        "rounds": rounds,
        "shapes": [shape.sizes() for shape in shapes],
    }
    return shapes, settings


def run(device: torch.device, args: argparse.Namespace, before: Sequence[Mapping[str, Any]]) -> int:
    """Compare at every shape, going on from the cases of an earlier call; returns the exit code."""
    total = Budget(args.budget_seconds)
    shapes, settings = plan(device, args)
    if device.type == "cpu":
        for name in PRELOADED:
            # Where one is missing, the rows of its arms say so.
            with suppress(ModuleNotFoundError):
                importlib.import_module(name)
    cases: list[dict[str, Any]] = []
    for at, shape in enumerate(shapes):
        known = {}
        # An earlier call may have ended before this shape.
        if at < len(before):
            for row in before[at]["rows"]:
                known[row["arm"]] = row
        comparison = Comparison(shape, known, settings["rounds"])
        case: dict[str, Any] = {**shape.sizes(), "rows_per_expert": shape.rows_per_expert}
        cases.append(case)

        def keep(comparison: Comparison = comparison, case: dict[str, Any] = case) -> None:
            rows = [comparison.rows[name] for name in ARMS if name in comparison.rows]
            if comparison.wrong:
                # Rows of an earlier call may have times.
                rows = without_times(rows)
            case |= {"wrong": comparison.wrong, "rows": rows}
            save(args.out, "peers", device, settings=settings, cases=cases)

        # The time left is divided among the shapes to come.
        share = total.part(1 / (len(shapes) - at))
        compare(shape, comparison, device, args.threads, share, keep)
        keep()
        print(show(case, dry=args.dry), flush=True)
    print(f"wrote {args.out}")
    for case in cases:
        # The first row is megalora's: a peer that cannot run is no failure.
        if case["wrong"] or not case["rows"][0]["status"].startswith(("ok", *CUT_OFF)):
            return 1
    return 0


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget-seconds", type=float, help="stop with what there is by then")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON; a second call with it goes on"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of each arm on a CPU (1)")
    parser.add_argument(
        "--dry", action="store_true", help="the whole path at tiny sizes on the CPU, in seconds"
    )
    args = parser.parse_args(given)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.dry and args.device == "cuda":
        parser.error("--dry runs on the CPU; leave --device out")
    if args.dry or args.device == "cpu":
        # CUDA reads this at its first use, which is below.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        parser.exit(2, f"{parser.prog}: --device cuda {NEEDS_GPU}\n")
    device = torch.device("cuda", 0) if found else torch.device("cpu")
    try:
        record = earlier(args.out, "peers", device, plan(device, args)[1])
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    cases = record["cases"] if record else []
    if any(case["wrong"] for case in cases):
        # Losses that did not agree may have been mended since: all of it again.
        cases = []
    return run(device, args, cases)


if __name__ == "__main__":
    sys.exit(main())
