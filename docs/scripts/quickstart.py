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
    rows = [json.loads(line) for line in metrics.splitlines()]
    return {
        "benchmark": "quickstart",
        "device": "CPU (x86_64)",
        "lines": [line for line in log.splitlines() if line and "━" not in line],
        "train": [[row["step"], row["loss"]] for row in rows if "loss" in row],
        "eval": [[row["step"], row["eval_loss"]] for row in rows if "eval_loss" in row],
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
