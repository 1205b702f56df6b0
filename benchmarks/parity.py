"""The same adapter under every layout: train all cases of the grid and compare them with plain transformers in float64.

    python -m benchmarks.parity [--only TEXT] [--out benchmarks/results/parity.json]

For each case (layout, model, adapter, recomputation, microbatch size): the initial loss, the losses and gradient norms of
five AdamW steps, every adapter gradient after reduction in each of them, and the adapters and both moments after them. Prints
the cases with the largest deviations first; exit code 1 when one exceeds its limit (tests/parity/case.py says why that much).

In bfloat16 a few cases follow, on the GPUs where there are any; see benchmarks/parity_bfloat16.py.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  sets up the host before anything from Megatron is imported
from benchmarks.harness import save
from tests.conftest import write_chats
from tests.forked import forked
from tests.parity.case import LIMITS, deviations, exceeded, expected, load_expected, run_case, save_expected
from tests.parity.grid import STEPS, Case, full_grid
from tests.parity.models import MODELS, make_model

AT_ONCE = 2


class Laboratory:
    """A folder with the models, the data, the oracle's answers and the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.chats = folder, write_chats(folder / "chats.jsonl")

    def base(self, case: Case) -> Path:
        return self.folder / f"base {case.model}"

    def answer(self, case: Case) -> Path:
        return self.folder / f"oracle {case.question}.pkl"

    def row(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def ask_oracle(self, case: Case) -> None:
        save_expected(self.answer(case), expected(case, STEPS, self.base(case), self.chats))

    def run(self, number: int, case: Case) -> None:
        """Train and compare; the row is a file, with the traceback where something failed."""
        _quietly(self.folder / f"{number}.log")
        row: dict[str, Any] = {"case": case.name, **vars(case), "batch": case.batch}
        try:
            run_case(case, STEPS, self.base(case), self.chats, self.folder / f"run {number}")
            row |= deviations(self.folder / f"run {number}", load_expected(self.answer(case)))
            losses = (self.folder / f"run {number}/metrics.jsonl").read_text().splitlines()
            row["losses"] = [r["loss"] for r in map(json.loads, losses) if "loss" in r]
        except Exception:
            row["failed"] = traceback.format_exc()
        self.row(number).write_text(json.dumps(row))


def _quietly(path: Path) -> None:
    log = path.open("w")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    import os

    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this, such as 'tp2-ep2' or 'shared'")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity.json"))
    args = parser.parse_args()
    cases = [case for case in full_grid() if args.only in case.name]
    if not cases:
        parser.error(f"no case's name contains {args.only!r}; one is {full_grid()[0].name!r}")
    with tempfile.TemporaryDirectory() as folder:
        rows = run_all(Laboratory(Path(folder)), cases)
    text = table(rows)
    print(text)
    save("parity", rows, args.out)
    sys.exit(any("failed" in row or exceeded(row) for row in rows))


def run_all(laboratory: Laboratory, cases: list[Case]) -> list[dict[str, Any]]:
    start = time.perf_counter()
    for model in [m for m in MODELS if any(case.model == m for case in cases)]:
        make_model(model, laboratory.base(next(case for case in cases if case.model == model)))
    questions = list({case.question: case for case in cases}.values())
    for case, _, code in forked(((c, laboratory.ask_oracle, (c,)) for c in questions), AT_ONCE):
        assert code == 0, f"the oracle failed at {case.question}"
    print(f"{len(questions)} trainings in plain transformers, float64: {time.perf_counter() - start:.0f} s", flush=True)
    # The longest first, so that no large world is left alone at the end.
    order = sorted(range(len(cases)), key=lambda i: (-cases[i].world, -cases[i].tp))
    jobs = ((i, laboratory.run, (i, cases[i])) for i in order)
    for done, (i, seconds, _) in enumerate(forked(jobs, AT_ONCE), 1):
        row = json.loads(laboratory.row(i).read_text())
        verdict = "FAILED" if "failed" in row else ", ".join(exceeded(row)) or "ok"
        print(f"{done:3d}/{len(cases)} {cases[i].name:62} {seconds:4.0f} s  {verdict}", flush=True)
    print(f"all: {time.perf_counter() - start:.0f} s")
    return [json.loads(laboratory.row(i).read_text()) for i in range(len(cases))]


def table(rows: list[dict[str, Any]]) -> str:
    """Every case, worst first: by the quantity that comes nearest to its limit."""
    good = [row for row in rows if "failed" not in row]
    good.sort(key=lambda row: max(row[name] / limit for name, limit in LIMITS.items()), reverse=True)
    lines = [f"{'case: world:layout model, adapter, recompute, microbatch':64}" + "".join(f"{n:>11}" for n in LIMITS)]
    lines += [f"{row['case']:64}" + "".join(f"{row[name]:11.1e}" for name in LIMITS) for row in good]
    if good:
        lines += [f"{'largest':64}" + "".join(f"{max(row[name] for row in good):11.1e}" for name in LIMITS)]
        lines += [f"{'allowed':64}" + "".join(f"{limit:11.0e}" for limit in LIMITS.values())]
        lines += [
            f"largest relative difference of a loss between two layouts of one model and adapter: {spread(good):.1e}"
        ]
    for row in (row for row in rows if "failed" in row):
        lines.append(f"FAILED {row['case']}\n{row['failed']}")
    return "\n".join(lines)


def spread(rows: Iterable[dict[str, Any]]) -> float:
    """Between any two cases with the same model, adapter and batch, over all steps."""
    losses = defaultdict(list)
    for row in rows:
        for step, loss in enumerate(row["losses"]):
            losses[row["model"], row["adapter"], row["batch"], step].append(loss)
    return max(max(of_step) / min(of_step) - 1 for of_step in losses.values())


if __name__ == "__main__":
    main()
