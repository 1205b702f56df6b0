"""Find the fastest variant of every grouped GEMM on this GPU, and from how many rows on torch's own
GEMM is faster, within a given time.

    python -m benchmarks.tune --budget-seconds 200 --out tuned.json
    python -m benchmarks.tune --out dry.json --dry     all of it on a CPU; times mean nothing

``MEGALORA_TUNED=tuned.json`` makes the kernels use what was found; copied to
``kernels/megalora_kernels/tuned/GPU.json``, with the name that the last line says, it ships. The
file is written after every point; a second call continues where the first stopped. A variant that
crashes the process, or hangs, costs a restart and is refused by name.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

MISTAKE = 2
"""Exit code for a wrong command line, or for a file that another run began."""
DEAD_DEVICE = 75
"""Exit code of a sweep whose device answers no more: it is started again without the variant that
did that."""
HUNG = 76
"""The same for a variant that does not come back."""
LEAST_SECONDS = 15
"""Seconds without which the sweep is not started again: importing torch takes half of them."""
LAST_SECONDS = 5
"""Last seconds of the budget, in which nothing is begun: a sweep that has not ended by itself when
all are spent is killed."""


def sweep(budget_seconds: float, out: Path, dry: bool) -> int:
    """Run the sweep in a process of its own until it ends by itself or time is over; its exit
    code."""
    end = time.monotonic() + budget_seconds
    env = dict(os.environ)
    # Triton and torch read these as they are imported, so they are set before the process begins.
    if dry:
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    while True:
        # The clock is the machine's, the same in both processes: importing torch counts too.
        command = [
            sys.executable,
            "-m",
            "benchmarks.tune_worker",
            "--end",
            f"{end - LAST_SECONDS:.3f}",
            "--out",
            str(out),
        ]
        process = subprocess.Popen([*command, *["--dry"] * dry], env=env)
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(
                f"out of time: the sweep was ended; its results until then are in {out}",
                file=sys.stderr,
            )
            return 0 if out.is_file() else 1
        # It ended by itself. Anything else, such as -11 for a segmentation fault, is a variant's
        # doing, which the next process finds by name in the file that ``Record.run`` left.
        if code in (0, 1, MISTAKE):
            return code
        print(f"the sweep's process ended with {code}", file=sys.stderr, flush=True)
        if end - time.monotonic() < LEAST_SECONDS:
            return 0 if out.is_file() else 1


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=200.0, help="seconds in all, with compiling"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="file of the table, with all times it rests on"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes through Triton's interpreter"
    )
    args = parser.parse_args(given)
    # NaN is not more than 0 either.
    if not args.budget_seconds > 0:
        parser.error(f"--budget-seconds {args.budget_seconds}: want a positive number of seconds")
    # Before any process is started, as a file of something else would be overwritten at its end.
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a folder; name a file")
    if args.out.is_file():
        try:
            record = json.loads(args.out.read_text())
        except json.JSONDecodeError as error:
            parser.error(
                f"--out {args.out} exists and is not JSON ({error}); give another, or remove it"
            )
        if not isinstance(record, dict) or record.get("benchmark") != "tune":
            parser.error(
                f"--out {args.out} exists and is not a result of this script; give another, or"
                " remove it"
            )
    return sweep(args.budget_seconds, args.out, args.dry)


if __name__ == "__main__":
    sys.exit(main())
