"""Record a run of ``make quickstart-rl``: its rewards, for the picture of docs/rl.md, and the gap
between vLLM and training.

    time make quickstart-rl
    python -m docs.scripts.quickstart_rl --seconds 266      # real time of the whole command

Reads runs/sums/run/metrics.jsonl; writes benchmarks/results/quickstart_rl.json.
"""

import argparse
import json
from pathlib import Path

from docs.scripts.figures import REWARDS
from megalora.config.file import load_config
from megalora.versions import versions

CONFIG = Path(__file__).parents[2] / "recipes/sums/train.yaml"


def record(metrics: str, steps: int, seconds: int) -> dict:
    """Mean reward and gap to the engine of each step.

    Args:
        metrics: content of metrics.jsonl.
        steps: number of steps that the run must have.
        seconds: that the whole command took, without installing.
    Raises:
        ValueError: the run did not come to its end.
    """
    rewards = []
    gaps = []
    for line in metrics.splitlines():
        row = json.loads(line)
        # Evaluations have rows of their own.
        if "reward" in row:
            rewards.append(row["reward"])
            gaps.append(row["engine_gap"])
    if len(rewards) != steps:
        raise ValueError(f"{len(rewards)} steps of {steps}; record a run that came to its end")
    return {
        "benchmark": "quickstart_rl",
        "device": "CPU (x86_64)",
        "versions": versions(),
        "seconds": seconds,
        "largest_gap": max(gaps),
        "rewards": rewards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, required=True, help="real time of the command")
    parser.add_argument("--run", type=Path, default=Path("runs/sums/run"))
    options = parser.parse_args()
    metrics = options.run / "metrics.jsonl"
    steps = load_config(CONFIG).train.steps
    assert steps is not None, "the recipe says its steps"
    try:
        found = record(metrics.read_text(), steps, options.seconds)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{metrics}: {error}") from None
    REWARDS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {REWARDS}")


if __name__ == "__main__":
    main()
