"""Train in every kind of layout with ranks that share one GPU, and compare with plain transformers
in float64.

    python -m benchmarks.shared_gpu [--budget-seconds 150] [--at-once 4] [--out FILE] [--dry]

The ranks of a case run the product's own training with the real kernels. Their collectives go
through the host (MEGALORA_SHARE_GPU=1), so that only NCCL is missing from a run on several GPUs.
Without a GPU the same trainings run on CPU ranks over gloo, which is how this script is tested.

A case passes where it is as near to float64 as float32 has to be on a CPU (tests/parity/case.py).
Since a GPU adds in another order, it also passes at twice the distance of one rank alone on the
same device, whose own limit is TOLERANCE times the CPU's. The exit code is 1 where a case fails.
Cases for which there was no time are named and do not fail; a second call with the same --out runs
them. --dry takes two cases, whose ranks are forked from this process on a CPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Importing the tests hides GPUs from this process and from those it starts, unless this variable
# tells them not to.
os.environ.setdefault("MEGALORA_TEST_GPU", str(int(torch.cuda.is_available())))
import tests.prepare  # noqa: F401  sets up the host before anything from Megatron is imported
from benchmarks.gpu_timing import Budget, earlier, save, table
from megalora import host
from megalora.config import RunConfig
from megalora.config.file import save_config
from megalora.environment import SHARE_GPU
from tests.distributed.ranks import run_ranks
from tests.fixtures import write_chats
from tests.parity.case import (
    LIMITS,
    Expected,
    deviations,
    exceeded,
    expected_of_clear_routing,
    prepare_run,
    read_run,
    train_recording_gradients,
)
from tests.parity.grid import SHORT, Case
from tests.parity.models import make_model

ALONE = Case(1)
SHARED = (
    Case(2, tp=2),
    Case(2, ep=2),
    Case(2, pp=2, recompute="full"),
    Case(4, tp=2, ep=2, etp=2, recompute="selective"),
    Case(4, tp=2, ep=2),
    Case(2, etp=2),
    Case(4, pp=2, vpp=2, ep=2),
    # Not packed: that takes more samples, and the oracle as much longer; gpu_long packs them.
    Case(2, cp=2),
    Case(4, cp=2, tp=2, ep=2, recompute="full"),
)
"""Cases, the likeliest to fail first: a budget may end before the last."""
TOLERANCE = 10.0
"""Factor between a CPU's limits and those of one rank on a GPU, whose reductions are trees and
whose exponentials are other polynomials: they deviate a few times as much. A wrong sum deviates
1,000 times as much."""
DRY = (Case(2, ep=2),)
SECONDS_OF_A_CASE = 40
"""Seconds without which no case is started: imports and CUDA's start on every rank, kernels to
compile, two steps."""


@dataclass
class Laboratory:
    """A folder with the model, the data and the runs."""

    folder: Path
    limit_s: float
    """Seconds that one case may take."""
    fork: bool = False
    """Whether ranks are forked from this process instead of started by torchrun: on a CPU alone,
    and one case at a time."""

    def __post_init__(self) -> None:
        self.chats = write_chats(self.folder / "chats.jsonl")
        self.base = make_model("moe", self.folder / "base")
        self.answers: dict[int, Expected] = {}

    def ask(self, cases: Sequence[Case]) -> None:
        """Have the oracle compute what the cases will be compared with, once for each batch
        size."""
        for case in cases:
            if case.batch not in self.answers:
                answer = expected_of_clear_routing(case, SHORT, self.base, self.chats)
                self.answers[case.batch] = answer

    def run(self, case: Case) -> dict[str, Any]:
        """Run a case and return its row: its deviations from the oracle, or why there are none."""
        begun = time.perf_counter()
        row: dict[str, Any] = {"case": case.name, "failed": None}
        failed = self._fork(case) if self.fork else self._train(case)
        if failed is None:
            found = read_run(self.folder / case.name)
            row |= deviations(found, self.answers[case.batch])
        return {**row, "failed": failed, "seconds": time.perf_counter() - begun}

    def _prepare(self, case: Case) -> tuple[RunConfig, Path]:
        out = self.folder / case.name
        seed = self.answers[case.batch].seed
        return prepare_run(case, SHORT, self.base, self.chats, out, "float32", seed)

    def _fork(self, case: Case) -> str | None:
        """Fork the ranks of a case; returns what they raised."""
        config, start = self._prepare(case)
        try:
            run_ranks(train_recording_gradients, case.world, config, start)
        except Exception as error:
            # A failed case is a row. The end of the message has the ranks' own error.
            return str(error)[-2000:]
        return None

    def _train(self, case: Case) -> str | None:
        """Start the ranks of a case with torchrun; returns the end of their log where they
        failed."""
        out = self.folder / case.name
        config, start = self._prepare(case)
        save_config(config, out / "asked.yaml")
        ranks = ["--standalone", f"--nproc-per-node={case.world}", "-m", "tests.parity.recorded"]
        command = [sys.executable, "-m", "torch.distributed.run", *ranks]
        command += [str(out / "asked.yaml"), str(start)]
        # torchrun kills ranks 30 s after it asked them to end; a budget has no room for that.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
        if torch.cuda.is_available() and case.world > 1:
            environment[SHARE_GPU] = "1"
        with (out / "log.txt").open("w") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                code = process.wait(self.limit_s)
            except subprocess.TimeoutExpired:
                # Asked, not killed, torchrun ends its ranks.
                process.terminate()
                process.wait()
                return f"no end after {self.limit_s:.0f} s"
        said = (out / "log.txt").read_text()
        return None if code == 0 else f"exit code {code}: {what_ranks_said(said)[-2000:]}"


def what_ranks_said(log: str) -> str:
    """A log of torchrun without torchrun's own report, which is longer than any rank's error and
    does not quote it."""
    said = []
    for line in log.splitlines():
        # From here on torchrun speaks.
        if "] failed (exitcode:" in line:
            break
        said.append(line)
    return "\n".join(said).strip()


class Found:
    """Rows in the order of the cases, written anew after each."""

    def __init__(
        self, cases: Sequence[Case], rows: list[dict[str, Any]], write: Callable[..., None]
    ) -> None:
        self.names = [case.name for case in cases]
        self.rows = {row["case"]: row for row in rows}
        self.write = write
        # Cases end on threads of their own.
        self.lock = threading.Lock()

    def put(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows[row["case"]] = row
            self.write(**self.content())

    def content(self) -> dict[str, Any]:
        """The content of the record: each row with the limits it exceeds, and the names of cases
        without a row."""
        rows = []
        not_reached = []
        for name in self.names:
            if name in self.rows:
                rows.append(self.rows[name])
            else:
                not_reached.append(name)
        # All of them anew: the case of one rank, which sets the others' limits, may end last.
        judge(rows)
        return {"rows": rows, "not_reached": not_reached}


def run_all(
    laboratory: Laboratory, cases: Sequence[Case], found: Found, budget: Budget, at_once: int
) -> None:
    """Run the cases that have no row yet and for which there is time."""
    laboratory.ask(cases)

    def started_in_time(case: Case) -> None:
        if budget.left() > SECONDS_OF_A_CASE or laboratory.fork:
            found.put(laboratory.run(case))

    if laboratory.fork:
        # One after another: a process with threads must not fork.
        for case in cases:
            started_in_time(case)
        return
    with ThreadPoolExecutor(at_once) as pool:
        # Read to the end, so that an exception in a thread is raised here.
        list(pool.map(started_in_time, cases))


def judge(rows: list[dict[str, Any]]) -> None:
    """Add to each row what it exceeds. The case of one rank, if it has run, sets the limits of the
    others."""
    alone = None
    for row in rows:
        if row["case"] == ALONE.name and not row["failed"]:
            alone = row
    for row in rows:
        if row["failed"]:
            row["exceeded"] = []
            continue
        limits = {}
        for name, on_cpu in LIMITS.items():
            if alone is None or row is alone:
                limits[name] = TOLERANCE * on_cpu
            else:
                # Sums over ranks round once more, so twice what one rank of this device needs.
                limits[name] = max(on_cpu, 2 * alone[name])
        row["exceeded"] = exceeded(row, limits)


def show(found: dict[str, Any]) -> str:
    """The table; below it what was not reached and why cases failed."""
    rows = []
    below = [f"not reached: {name}" for name in found["not_reached"]]
    for row in found["rows"]:
        verdict = "FAILED" if row["failed"] else ", ".join(row["exceeded"]) or "ok"
        values = []
        for name in LIMITS:
            # A case that failed left no deviations.
            values.append("-" if row["failed"] else f"{row[name]:.1e}")
        if row["failed"]:
            below.append(f"{row['case']}: {row['failed']}")
        rows.append((row["case"], *values, f"{row['seconds']:.0f}", verdict))
    return "\n".join([table(("case", *LIMITS, "seconds", "verdict"), rows), *below])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=None, help="no case is started that would end later"
    )
    parser.add_argument("--at-once", type=int, default=4, help="cases that run at the same time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_shared.json"))
    parser.add_argument("--dry", action="store_true", help="two cases on forked CPU ranks")
    args = parser.parse_args(arguments)
    budget = Budget(args.budget_seconds)
    device = host.device()
    cases = (ALONE, *(DRY if args.dry else SHARED))
    settings = {"steps": SHORT, "dry": args.dry}
    record = earlier(args.out, "shared_gpu", device, settings) or {"rows": []}
    passed = set()
    for row in record["rows"]:
        # A failed case is run again: it may have lacked memory or time.
        if not (row["failed"] or row["exceeded"]):
            passed.add(row["case"])

    def write(**content: Any) -> None:
        save(args.out, "shared_gpu", device, settings=settings, **content)

    found = Found(cases, record["rows"], write)
    # What an earlier call saw pass stays.
    missing = [case for case in cases if case.name not in passed]
    with tempfile.TemporaryDirectory() as folder:
        limit_s = max(1.0, min(150.0, budget.left()))
        run_all(Laboratory(Path(folder), limit_s, args.dry), missing, found, budget, args.at_once)
    content = found.content()
    write(**content)
    print(
        f"float32, {SHORT} steps, ranks on one {host.device_name()}, largest deviations from"
        " float64:"
    )
    print(show(content))
    return int(any(row["failed"] or row["exceeded"] for row in content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
