"""Every kind of layout on one GPU: trainings whose ranks share it, compared with plain transformers in float64.

    python -m benchmarks.shared_gpu [--budget-seconds 150] [--at-once 3] [--out FILE]

The ranks of a case run the product's own training with the real kernels; their collectives go through the host
(MEGALORA_SHARE_GPU=1), so that of what several GPUs do only NCCL is missing. Without a GPU the same trainings run on CPU
ranks over gloo: that is how this script is tested.

A case passes when it is as near to float64 as float32 has to be on a CPU (tests/parity/case.py) or, since a GPU adds in
another order, at most twice as far as one rank alone on the same device, whose own limit is TOLERANCE times the CPU's.
Exit code 1 when a case fails; what there was no time for is named and does not fail.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Importing the tests hides GPUs from this process and from those it starts, unless it is told not to.
os.environ.setdefault("MEGALORA_TEST_GPU", str(int(torch.cuda.is_available())))
import tests.conftest  # noqa: F401  sets up the host before anything from Megatron is imported
from benchmarks.gpu_timing import Budget, save, table
from megalora import host
from megalora.config_file import save_config
from megalora.environment import SHARE_GPU
from tests.conftest import write_chats
from tests.parity.case import (
    LIMITS,
    Expected,
    deviations,
    exceeded,
    expected_of_clear_routing,
    prepare_run,
    read_run,
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
)
"""The likeliest to fail first: a budget may end before the last."""
TOLERANCE = 10.0
"""A GPU's reductions are trees and its exponentials are other polynomials: a few times a CPU's rounding. A wrong sum is 1e3."""
SECONDS_OF_A_CASE = 45
"""Imports and CUDA's start on every rank, then two steps: no case is started with less time left."""


@dataclass
class Laboratory:
    """A folder with the model, the data and the runs."""

    folder: Path
    limit_s: float
    """For one case."""

    def __post_init__(self) -> None:
        self.chats = write_chats(self.folder / "chats.jsonl")
        self.base = make_model("moe", self.folder / "base")
        self.answers: dict[int, Expected] = {}

    def ask(self, cases: tuple[Case, ...]) -> None:
        """Have the oracle answer what the cases will be compared with: once for each size of the batch."""
        for case in cases:
            if case.batch not in self.answers:
                answer = expected_of_clear_routing(case, SHORT, self.base, self.chats)
                self.answers[case.batch] = answer

    def run(self, case: Case) -> dict[str, Any]:
        """A row: the deviations of a case from the oracle, or why there are none."""
        begun = time.perf_counter()
        row: dict[str, Any] = {"case": case.name, "failed": None}
        failed = self._train(case)
        if failed is None:
            found = read_run(self.folder / case.name)
            row |= deviations(found, self.answers[case.batch])
        return {**row, "failed": failed, "seconds": time.perf_counter() - begun}

    def _train(self, case: Case) -> str | None:
        """Start the ranks of a case; the end of what they said where they failed."""
        out = self.folder / case.name
        seed = self.answers[case.batch].seed
        config, start = prepare_run(case, SHORT, self.base, self.chats, out, "float32", seed)
        save_config(config, out / "asked.yaml")
        ranks = ["--standalone", f"--nproc-per-node={case.world}", "-m", "tests.parity.recorded"]
        command = [sys.executable, "-m", "torch.distributed.run", *ranks, str(out / "asked.yaml"), str(start)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
        if torch.cuda.is_available() and case.world > 1:
            environment[SHARE_GPU] = "1"
        with (out / "log.txt").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                code = process.wait(self.limit_s)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its ranks
                process.wait()
                return f"no end after {self.limit_s:.0f} s"
        said = (out / "log.txt").read_text().strip()
        return None if code == 0 else f"exit code {code}: {said[-2000:]}"


def run_all(cases: tuple[Case, ...], budget: Budget, at_once: int, limit_s: float) -> dict[str, Any]:
    """Rows of the cases, one rank alone first, and the names of those that there was no time for."""
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(Path(folder), limit_s)
        laboratory.ask((ALONE, *cases))
        # Alone, so that its ranks compile the kernels which the others then find in Triton's cache.
        rows = [laboratory.run(ALONE)]

        def started_in_time(case: Case) -> dict[str, Any] | None:
            return laboratory.run(case) if budget.left() > SECONDS_OF_A_CASE else None

        with ThreadPoolExecutor(at_once) as pool:
            found = list(pool.map(started_in_time, cases))
    rows += [row for row in found if row is not None]
    judge(rows)
    missing = [case.name for case, row in zip(cases, found, strict=True) if row is None]
    return {"rows": rows, "not_reached": missing}


def judge(rows: list[dict[str, Any]]) -> None:
    """Add to each row what it exceeds: the first, one rank alone, is the measure of the others."""
    alone = rows[0]
    wide = {name: TOLERANCE * limit for name, limit in LIMITS.items()}
    for row in rows:
        limits = (
            wide if row is alone or alone["failed"] else {name: max(LIMITS[name], 2 * alone[name]) for name in LIMITS}
        )
        row["exceeded"] = [] if row["failed"] else exceeded(row, limits)


def show(found: dict[str, Any]) -> str:
    head = ("case", *LIMITS, "seconds", "verdict")
    rows = []
    for row in found["rows"]:
        verdict = "FAILED" if row["failed"] else ", ".join(row["exceeded"]) or "ok"
        values = ["-" if row["failed"] else f"{row[name]:.1e}" for name in LIMITS]
        rows.append((row["case"], *values, f"{row['seconds']:.0f}", verdict))
    lines = [table(head, rows)]
    lines += [f"not reached: {name}" for name in found["not_reached"]]
    lines += [f"{row['case']}: {row['failed']}" for row in found["rows"] if row["failed"]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-seconds", type=float, default=None, help="no case is started that would end later")
    parser.add_argument("--at-once", type=int, default=3, help="cases that run at the same time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_shared.json"))
    args = parser.parse_args(arguments)
    budget = Budget(args.budget_seconds)
    found = run_all(SHARED, budget, args.at_once, limit_s=min(150.0, budget.left()))
    print(f"float32, {SHORT} steps, ranks on one {host.device_name()}, largest deviations from float64:")
    print(show(found))
    save(args.out, "shared_gpu", host.device(), **found)
    return int(any(row["failed"] or row["exceeded"] for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
