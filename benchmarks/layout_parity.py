"""How far apart layouts end up: the initial loss, gradient norms and adapters of a short training, against plain transformers.

    python -m benchmarks.layout_parity [--out benchmarks/results/layout_parity.json]

The comparison of tests/distributed/test_layouts.py, printed as a table instead of asserted.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.harness import save
from megalora.tiny import make_tiny
from megalora.train.loop import train
from tests.conftest import write_chats
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import LAYOUTS, STEPS, expected_training, make_config, records
from tests.oracles.training import read_adapter

COLUMNS = ("layout", "ranks", "initial loss", "loss", "gradient norm", "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layout_parity.json"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base, chats = make_tiny(Path(folder) / "base"), write_chats(Path(folder) / "chats.jsonl")
        expected = expected_training(base, chats)
        for name, (world, parallel, recompute) in LAYOUTS.items():
            run = Path(folder) / name
            run_ranks(train, world, make_config(base, chats, run, parallel, recompute))
            adapter = read_adapter(run / f"step_{STEPS:06d}")
            rows.append(
                {
                    "layout": name,
                    "ranks": world,
                    "initial loss": abs(records(run, "eval_loss")[0] / expected.eval_loss - 1),
                    "loss": _worst_ratio(records(run, "loss"), expected.losses),
                    "gradient norm": _worst_ratio(records(run, "grad_norm"), expected.norms),
                    "adapter": max((adapter[t] - v).abs().max().item() for t, v in expected.adapter.items()),
                }
            )
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "--:|" * (len(COLUMNS) - 1))
    for row in rows:
        print("| " + " | ".join(f"{row[c]:.1e}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS) + " |")
    save("layout_parity", rows, args.out)


def _worst_ratio(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
