"""Run the tests that need a GPU within a budget, the most telling first, and record the outcome of
each.

    python -m benchmarks.gpu_tests --budget-seconds 50 --out benchmarks/results/gpu_tests.json

Chosen are tests of megalora's own training step, of the values of all kernels in bfloat16, and that
nothing waits for the device; ``--all`` takes every file in tests/gpu. The record is written after
every test. A second call leaves out what passed before. ``--dry`` runs the training step's tests on
a CPU, where kernels are interpreted.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_timing import Budget, earlier, save, the_gpu

ROOT = Path(__file__).parents[1]
STEP = "tests/gpu/test_step_on_gpu.py"
KERNELS = "tests/gpu/test_kernels_on_gpu.py"
LOSS = "tests/gpu/test_loss_on_gpu.py"
CHOICE = f"{Path(STEP).stem} or nothing_waits or (agree and float64 and bfloat16)"
DEADLINE = "MEGALORA_TESTS_DEADLINE"
PASSED = "MEGALORA_TESTS_PASSED"
"""Variables of the environment, which reach the processes of pytest-xdist too: the time after which
no test is begun, in seconds of the clock, and the names of tests that passed in an earlier call."""
OUT_OF_TIME = "out of time"
PROCESSES = 4
"""Number of processes where pytest-xdist is installed: these tests mostly compile kernels, which
takes a core each."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin no test after the deadline (this module is a plug-in of the pytest that it starts)."""
    if time.time() > float(os.environ[DEADLINE]):
        pytest.skip(OUT_OF_TIME)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what passed in an earlier call."""
    passed = set(json.loads(os.environ[PASSED]))
    done = [item for item in items if item.nodeid in passed]
    # In place: pytest keeps the list that it handed over.
    items[:] = [item for item in items if item.nodeid not in passed]
    config.hook.pytest_deselected(items=done)


class Results:
    """A plug-in of pytest that records the outcome of every test as soon as it is known."""

    def __init__(self, out: Path, device: Any, settings: dict[str, Any]) -> None:
        self.out = out
        self.device = device
        self.settings = settings
        record = earlier(out, "gpu_tests", device, settings) or {"rows": []}
        self.rows = [row for row in record["rows"] if row["outcome"] == "passed"]
        self.passed = [row["test"] for row in self.rows]
        self.not_reached: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # pytest reports setup, call and teardown of a test. A skip comes at setup; of setups and
        # teardowns that passed there is nothing to record.
        if report.when != "call" and report.outcome == "passed":
            return
        why = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            why = report.longreprtext.strip().splitlines()[-1][:300]
        if why == OUT_OF_TIME:
            self.not_reached.append(report.nodeid)
        else:
            row = {
                "test": report.nodeid,
                "outcome": report.outcome,
                "why": why,
                "seconds": round(report.duration, 2),
            }
            self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the record anew, with all outcomes so far."""
        failures = []
        for row in self.rows:
            if row["outcome"] == "failed":
                failures.append(f"{row['test']}: {row['why']}")
        save(
            self.out, "gpu_tests", self.device, settings=self.settings, rows=self.rows,
            not_reached=self.not_reached, failures=failures,
        )  # fmt: skip


def words_for(dry: bool, everything: bool) -> list[str]:
    """Return pytest's command line."""
    words = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_tests", "--rootdir", str(ROOT)]
    if importlib.util.find_spec("xdist") and not dry:
        words += ["-n", str(PROCESSES)]
    if everything:
        return [*words, "tests/gpu"]
    # The kernels' tests on a CPU are tests/kernels, which need no GPU.
    files = [STEP] if dry else [STEP, KERNELS, LOSS]
    # Without the conftest, which imports what all other tests need.
    return [*words, "--noconftest", "-k", CHOICE, *files]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget-seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_tests.json"))
    parser.add_argument("--all", action="store_true", help="every test in tests/gpu")
    parser.add_argument("--dry", action="store_true", help="the training step alone, on a CPU")
    args = parser.parse_args(given)
    device = the_gpu(parser, args.dry)
    os.environ[DEADLINE] = str(time.time() + Budget(args.budget_seconds).left())
    os.chdir(ROOT)
    results = Results(args.out, device, {"all": args.all, "dry": args.dry})
    os.environ[PASSED] = json.dumps(results.passed)
    code = pytest.main(words_for(args.dry, args.all), plugins=[results])
    results.write()
    # All passed in earlier calls: pytest calls it an error that it was left no test.
    nothing_left = code == pytest.ExitCode.NO_TESTS_COLLECTED and bool(results.passed)
    return 0 if nothing_left else int(code)


if __name__ == "__main__":
    sys.exit(main())
