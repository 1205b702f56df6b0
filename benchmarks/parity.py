"""Train the same adapter under every layout of the grid and compare each with plain transformers in
float64.

    python -m benchmarks.parity [--only TEXT] [--out benchmarks/results/parity.json] [--show FILE]

For each case (layout, model, adapter, recomputation, microbatch size): the initial loss, the losses
and gradient norms of five AdamW steps, every adapter gradient after reduction in each of them, and
the adapters and both moments after them. Prints the cases with the largest deviations first; exit
code 1 when one exceeds its limit (tests/parity/case.py says why that much). A few cases in bfloat16
follow, on the GPUs where there are any; benchmarks/parity_bfloat16.py derives what they are
allowed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import tests.prepare  # noqa: F401  sets up the host before anything from Megatron is imported
from benchmarks import parity_bfloat16
from benchmarks.harness import save
from tests.environment import OUTSIDE
from tests.fixtures import write_chats
from tests.forked import forked
from tests.parity.base_formats import make_folders
from tests.parity.case import (
    LIMITS,
    deviations,
    exceeded,
    expected_of_clear_routing,
    limits_of,
    load_expected,
    read_run,
    run_case,
    save_expected,
)
from tests.parity.grid import STEPS, Case, full_grid
from tests.parity.models import MODELS, arch_of, make_model, make_teacher

AT_ONCE = 2
"""Number of cases that run at once; a large one has up to 8 processes already."""


WIDTH = 84
"""Of a case's name in a table."""


class Laboratory:
    """A folder with the models, the data, the oracle's answers and the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chats = write_chats(folder / "chats.jsonl")

    def base(self, model: str) -> Path:
        return self.folder / f"base {model}"

    def answer(self, case: Case) -> Path:
        return self.folder / f"oracle {case.question}.pkl"

    def row(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def ask_oracle(self, case: Case) -> None:
        """Train as plain transformers does, and leave the answer as a file."""
        quietly(self.folder / "oracle.log")
        answer = expected_of_clear_routing(case, STEPS, self.base(case.model), self.chats)
        save_expected(self.answer(case), answer)

    def run(self, name: str, case: Case) -> None:
        """Train, compare, and leave the row as a file."""
        run = self.folder / f"run {name}"

        def compare() -> dict[str, Any]:
            answer = load_expected(self.answer(case))
            run_case(case, STEPS, self.base(case.model), self.chats, run, seed=answer.seed)
            found = read_run(run)
            row = deviations(found, answer)
            return {
                **row,
                "data_seed": answer.seed,
                "router_margin": answer.margin,
                "losses": found.trained.losses,
                "exceeded": exceeded(row, limits_of(case)),
            }

        family = arch_of(MODELS[case.model])
        known = {"case": case.name, "family": family, **vars(case), "batch": case.batch}
        self.keep(name, known, compare)

    def keep(self, name: str, row: dict[str, Any], job: Callable[[], dict[str, Any]]) -> None:
        """``row`` with what the job found, or with the traceback where it failed."""
        quietly(self.folder / f"{name}.log")
        try:
            row |= {"failed": None, **job()}
        except Exception:
            row["failed"] = traceback.format_exc()
        self.row(name).write_text(json.dumps(row))


def quietly(path: Path) -> None:
    """Send what this process and its children say to a file."""
    with path.open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="cases whose name contains this, such as 'tp2-ep2' or 'shared'"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity.json"))
    parser.add_argument(
        "--show",
        type=Path,
        metavar="FILE",
        help="print the tables of an earlier run and do nothing else",
    )
    args = parser.parse_args()
    if args.show:
        show(json.loads(args.show.read_text())["rows"])
        return
    cases = [case for case in full_grid() if args.only in case.name]
    if not cases:
        parser.error(f"no case's name contains {args.only!r}; one is {full_grid()[0].name!r}")
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(Path(folder))
        rows = float32(laboratory, cases)
        print(table(rows), flush=True)
        rows += bfloat16(laboratory)
    save("parity", rows, args.out)
    sys.exit(any(row["failed"] or row["exceeded"] for row in rows))


def show(rows: list[dict[str, Any]]) -> None:
    """Print the tables of a record."""
    in_float32 = []
    in_bfloat16 = []
    for row in rows:
        # Cases in bfloat16 have plain transformers' deviations beside their own.
        if "plain" in row:
            in_bfloat16.append(row)
        else:
            in_float32.append(row)
    print(table(in_float32))
    print(parity_bfloat16.table(in_bfloat16))


def one_of_each_question(cases: Iterable[Case]) -> list[Case]:
    """A case for each question to the oracle: layouts of the same model, adapter and batch share
    one answer, since the oracle has no layout."""
    found: dict[Any, Case] = {}
    for case in cases:
        found.setdefault(case.question, case)
    return list(found.values())


def float32(laboratory: Laboratory, cases: list[Case]) -> list[dict[str, Any]]:
    """Run all cases and return their rows."""
    start = time.perf_counter()
    wanted = {case.model for case in cases}
    for model in MODELS:
        if model in wanted:
            make_model(model, laboratory.base(model))
            make_teacher(laboratory.base(model))
    for case in cases:
        make_folders(laboratory.base(case.model), case.base)
    questions = one_of_each_question(cases)
    # In processes of their own: each leaves its memory to the next, and they run two at a time.
    jobs = [(case, laboratory.ask_oracle, (case,)) for case in questions]
    for case, _, code in forked(jobs, AT_ONCE):
        assert code == 0, (
            f"the oracle failed at {case.question}:"
            f" {(laboratory.folder / 'oracle.log').read_text()[-2000:]}"
        )
    print(
        f"{len(questions)} trainings in plain transformers, float64:"
        f" {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    # The longest first, so that no large world is left alone at the end.
    order = sorted(cases, key=lambda case: (-case.world, -case.tp))
    jobs: list[Any] = []
    for case in order:
        jobs.append((case, laboratory.run, (case.name, case)))
    for done, (case, seconds, _) in enumerate(forked(jobs, AT_ONCE), 1):
        row = json.loads(laboratory.row(case.name).read_text())
        verdict = "FAILED" if row["failed"] else ", ".join(row["exceeded"]) or "ok"
        print(f"{done:3d}/{len(cases)} {case.name:{WIDTH}} {seconds:4.0f} s  {verdict}", flush=True)
    print(f"all: {time.perf_counter() - start:.0f} s")
    # In the order of the grid: they ended in another one.
    rows = []
    for case in cases:
        rows.append(json.loads(laboratory.row(case.name).read_text()))
    return rows


def bfloat16(laboratory: Laboratory) -> list[dict[str, Any]]:
    """Run the cases in bfloat16 and print their table. They run in a process of their own, so that
    what they print stays out of it."""

    def job() -> dict[str, Any]:
        rows, text = parity_bfloat16.run_all(laboratory.chats, laboratory.folder, OUTSIDE)
        return {"rows": rows, "table": text, "exceeded": []}

    # ``forked`` is an iterator: it runs its jobs as it is read.
    for _ in forked([("bfloat16", laboratory.keep, ("bfloat16", {"case": "bfloat16"}, job))], 1):
        pass
    found = json.loads(laboratory.row("bfloat16").read_text())
    print(found["failed"] or found["table"], flush=True)
    return [found] if found["failed"] else found["rows"]


def table(rows: list[dict[str, Any]]) -> str:
    """Every case, worst first: by the quantity that comes nearest to its limit."""
    good = [row for row in rows if not row["failed"]]
    good.sort(key=nearest_to_limit, reverse=True)
    head = f"{'case: world:layout model, adapter, recompute, microbatch, samples':{WIDTH}}"
    for name in LIMITS:
        head += f"{name:>11}"
    lines = [head]
    for row in good:
        lines.append(f"{row['case']:{WIDTH}}{numbers(row)}")
    if good:
        lines.append(f"{'largest':{WIDTH}}{numbers(largest_of(good))}")
        lines.append(f"{'allowed':{WIDTH}}{numbers(LIMITS, digits=0)}")
        lines.append(
            "largest relative difference of a loss between two layouts of one training:"
            f" {spread(good):.1e}"
        )
    for row in rows:
        if row["failed"]:
            lines.append(f"FAILED {row['case']}\n{row['failed']}")
    return "\n".join(lines)


def largest_of(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest deviation of each quantity over all rows."""
    found = dict.fromkeys(LIMITS, 0.0)
    for row in rows:
        for name in LIMITS:
            found[name] = max(found[name], row[name])
    return found


def nearest_to_limit(row: dict[str, Any]) -> float:
    """The largest deviation of a case as a share of what that quantity is allowed."""
    return max(row[name] / limit for name, limit in LIMITS.items())


def numbers(values: Mapping[str, float], digits: int = 1) -> str:
    """The columns of the table for one row: a value for each key of ``LIMITS``."""
    line = ""
    for name in LIMITS:
        line += f"{values[name]:11.{digits}e}"
    return line


def spread(rows: Iterable[dict[str, Any]]) -> float:
    """The largest difference of a step's loss between any two cases that ask the oracle one
    question, relative to the largest loss of these runs."""
    runs: dict[Any, list[list[float]]] = defaultdict(list)
    for row in rows:
        runs[case_of(row).question].append(row["losses"])
    largest = 0.0
    for losses in runs.values():
        # A policy's loss may pass through zero within a run.
        size = max(map(abs, chain.from_iterable(losses)))
        for of_step in zip(*losses, strict=True):
            largest = max(largest, (max(of_step) - min(of_step)) / size)
    return largest


def case_of(row: Mapping[str, Any]) -> Case:
    """The case of a row; factors that an older record does not know have their defaults."""
    known: dict[str, Any] = {}
    for field in fields(Case):
        if field.name in row:
            known[field.name] = row[field.name]
    return Case(**known)


if __name__ == "__main__":
    main()
