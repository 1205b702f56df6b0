"""Record a run of the quickstart: what it printed, and its losses, for README and its picture.

    make quickstart | tee quickstart.log
    python -m docs.scripts.quickstart quickstart.log

Reads the log and runs/quickstart/run/metrics.jsonl; writes benchmarks/results/quickstart.json.
"""

import argparse
import json
from pathlib import Path

from docs.scripts.figures import RECORD

METRICS = Path("runs/quickstart/run/metrics.jsonl")


def record(log: str, metrics: str) -> dict:
    """Printed lines, progress bars left out, and (step, loss) of training and evaluation."""
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
        "lines": lines,
        "train": train,
        "eval": evaluation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", type=Path, help="what make quickstart printed")
    log = parser.parse_args().log
    found = record(log.read_text(), METRICS.read_text())
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {RECORD}")


if __name__ == "__main__":
    main()
