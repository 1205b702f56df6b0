"""Record a run of the quickstart: what it printed, and its losses, for README and its picture.

    make quickstart | tee quickstart.log
    python -m docs.scripts.quickstart quickstart.log

Reads the log and runs/quickstart/run/metrics.jsonl; writes benchmarks/results/quickstart.json.
"""

import argparse
import json
import re
from pathlib import Path

from docs.scripts.figures import RECORD
from megalora.versions import versions

METRICS = Path("runs/quickstart/run/metrics.jsonl")
STEP = re.compile(r"^(\d+)/(\d+)  ", re.MULTILINE)
"""The heading of a step that launch/quickstart.sh prints, such as ``1/5  a tiny random ...``."""


def record(log: str, metrics: str) -> dict:
    """Printed lines, progress bars left out, and (step, loss) of training and evaluation.

    Raises:
        ValueError: the log is not of a whole run, from the first step to the last.
    """
    found = STEP.findall(log)
    numbers = [int(number) for number, _ in found]
    last = int(found[0][1]) if found else 0
    if not last or numbers != list(range(1, last + 1)):
        raise ValueError(
            f"the log has steps {numbers} of {last}; record a run that came to its end"
        )
    lines = []
    for line in log.splitlines():
        # Progress bars are drawn with this character.
        if line and "━" not in line:
            lines.append(line)
    train: list[list[float]] = []
    evaluation: list[list[float]] = []
    for line in metrics.splitlines():
        row = json.loads(line)
        # A step that also evaluates writes two rows, one with each kind of loss.
        if "loss" in row:
            train.append([row["step"], row["loss"]])
        if "eval_loss" in row:
            evaluation.append([row["step"], row["eval_loss"]])
    return {
        "benchmark": "quickstart",
        "device": "CPU (x86_64)",
        "versions": versions(),
        "lines": lines,
        "train": train,
        "eval": evaluation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", type=Path, help="what make quickstart printed")
    log = parser.parse_args().log
    try:
        found = record(log.read_text(), METRICS.read_text())
    except ValueError as error:
        raise SystemExit(f"{log}: {error}") from None
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {RECORD}")


if __name__ == "__main__":
    main()
