"""Draw the reward of a run, and say where it began and ended.

python -m recipes.sums.curve RUN        # RUN/reward.png
"""

import json
import sys
from pathlib import Path

import matplotlib

# No screen is needed.
matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEW = 5
"""Steps of which a mean is said: the prompts of a single one are 16 of 100."""


def main(run: Path) -> None:
    rewards: list[float] = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "reward" in record:
            rewards.append(record["reward"])
    first = sum(rewards[:FEW]) / len(rewards[:FEW])
    last = sum(rewards[-FEW:]) / len(rewards[-FEW:])
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(rewards) + 1), rewards)
    axes.set(xlabel="step", ylabel="mean reward of 128 completions", ylim=(0, 1))
    figure.savefig(run / "reward.png", dpi=120)
    print(f"mean reward: {first:.2f} in the first {FEW} steps, {last:.2f} in the last {FEW}")
    print(f"wrote {run / 'reward.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
