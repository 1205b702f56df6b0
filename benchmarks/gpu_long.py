"""Check what long rows rest on, on one GPU: attention by document, packing, the chunked loss,
context parallelism, memory.

    python -m benchmarks.gpu_long [--only CHECK ...] [--budget-seconds 90] [--out FILE] [--dry]

Seven checks, each in a process of its own that has its share of the time: an error of CUDA, which
spoils a process, or one that hangs costs its own check alone. A check prints one line, and the
record is written after each. A second call runs those that failed or were not reached. The exit
code is 1 where one failed. ``--dry`` takes tiny sizes on a CPU, where the reference stands in for
flash attention.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import long_attention, long_loss, long_training
from benchmarks.gpu_timing import Budget, earlier, first_line, save, the_gpu

ROOT = Path(__file__).parents[1]
LEAST_SECONDS = 6
"""Seconds without which no check is begun: torch has to be imported."""
GRACE_S = 10
"""Seconds that a check which is asked to end has for it."""


@dataclass(frozen=True)
class Check:
    """One of the seven."""

    name: str
    share: int
    """Seconds that it should take of all checks' together, in proportion for another total; what
    one leaves over goes to the next."""
    run: Callable[[torch.device, bool], dict[str, Any]]
    """Takes the device and whether the run is dry; returns at least a status and a line."""


def _attention(device: torch.device, dry: bool) -> dict[str, Any]:
    return long_attention.check(device, _heads(dry))


def _speed(device: torch.device, dry: bool) -> dict[str, Any]:
    return long_attention.speed(device, _heads(dry))


def _flash4(device: torch.device, dry: bool) -> dict[str, Any]:
    return long_attention.with_flash4(device, _heads(dry))


def _heads(dry: bool) -> long_attention.Heads:
    return long_attention.DRY if dry else long_attention.Heads()


def _loss(device: torch.device, dry: bool) -> dict[str, Any]:
    return long_loss.check(device, long_loss.DRY if dry else long_loss.Sizes())


CHECKS = (
    Check("attention", 10, _attention),
    Check("packed", 20, long_training.check_packed),
    Check("speed", 12, _speed),
    Check("loss", 12, _loss),
    Check("cp", 20, long_training.check_cp),
    Check("memory", 16, long_training.check_memory),
    Check("flash4", 10, _flash4),
)
"""Those that others need come first."""
NAMES = [check.name for check in CHECKS]


def run_here(check: Check, device: torch.device, dry: bool) -> dict[str, Any]:
    """The row of a check that runs in this process; its failure is a row, too."""
    begun = time.perf_counter()
    try:
        found = check.run(device, dry)
    except Exception as error:
        # The whole of it is in the log; the row has what it says.
        traceback.print_exc()
        found = {"status": f"FAILED: {first_line(error)}", "line": first_line(error)}
    seconds = round(time.perf_counter() - begun, 1)
    return {"check": check.name, **found, "seconds": seconds}


def run_apart(check: Check, limit_s: float, dry: bool) -> dict[str, Any]:
    """The row of a check that runs in a process of its own, for at most ``limit_s``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.gpu_long", "--check", check.name]
        command += ["--row", str(out), *(["--dry"] if dry else [])]
        begun = time.perf_counter()
        code = wait_or_end(subprocess.Popen(command, cwd=ROOT), limit_s)
        if out.is_file():
            return json.loads(out.read_text())
        why = f"no end after {limit_s:.0f} s" if code is None else f"its process ended with {code}"
        seconds = round(time.perf_counter() - begun, 1)
        return {"check": check.name, "status": f"FAILED: {why}", "line": why, "seconds": seconds}


def wait_or_end(process: "subprocess.Popen[bytes]", limit_s: float) -> int | None:
    """The exit code; None where the limit came first. Then, and where this process is being ended,
    the other one is asked to end and has a while to end the ranks that it started."""
    try:
        return process.wait(None if limit_s == math.inf else limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def limit_of(check: Check, left: Sequence[Check], seconds: float) -> float:
    """Seconds that a check may take of those that are left for it and the ones behind it: twice its
    share, since most take less than theirs."""
    whole = sum(other.share for other in left)
    return seconds * min(1.0, 2 * check.share / whole)


def run(device: torch.device, args: argparse.Namespace) -> int:
    """Run every check that time allows and no earlier call has seen pass; the exit code."""
    budget = Budget(args.budget_seconds)
    settings = {"dry": args.dry, "only": args.only}
    record = earlier(args.out, "gpu_long", device, settings) or {"rows": []}
    rows = {}
    for row in record["rows"]:
        if not row["status"].startswith("FAILED"):
            rows[row["check"]] = row
    asked = [check for check in CHECKS if check.name in (args.only or NAMES)]
    todo = [check for check in asked if check.name not in rows]
    for number, check in enumerate(todo):
        limit_s = limit_of(check, todo[number:], budget.left())
        if limit_s >= LEAST_SECONDS:
            rows[check.name] = row = run_apart(check, limit_s, args.dry)
            print(f"{check.name}: {row['status']}: {row['line']}", flush=True)
        # After each: the script may be ended at any time.
        ordered = [rows[known.name] for known in CHECKS if known.name in rows]
        left = [known.name for known in asked if known.name not in rows]
        save(args.out, "gpu_long", device, settings=settings, rows=ordered, not_reached=left)
    for row in rows.values():
        if row["status"].startswith("FAILED"):
            return 1
    return 0


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget-seconds", type=float, help="no check takes longer than its share of these"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_long.json"))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, metavar="CHECK", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument("--check", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    device = the_gpu(parser, args.dry)
    # By default SIGTERM ends Python at once; as an exception it ends what was started first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.check is None:
        return run(device, args)
    [check] = [check for check in CHECKS if check.name == args.check]
    args.row.write_text(json.dumps(run_here(check, device, args.dry)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
