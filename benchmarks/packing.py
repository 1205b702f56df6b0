"""Measure what packing gives: slots that hold a token, and speed beside a padded run.

    python -m benchmarks.packing fill data/gsm8k/train.jsonl
    python -m benchmarks.packing speed data/gsm8k/train.jsonl --padded CHECKOUT

``fill`` divides every step of one epoch over ranks and rows, as training does, and counts slots:
ranks x longest row, summed over rounds; with pipeline stages all rows of a step count as its
longest. ``speed`` trains a small model on one CPU rank, packed by this checkout and padded by
another one of a commit that pads (eb92b9b), turn by turn, and compares speed and losses.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import save
from megalora.data.order import global_batch_indices
from megalora.data.pack import measure_fill, rows_by_count, rows_by_tokens
from megalora.data.splits import load_split
from megalora.data.tokenizer import load_tokenizer
from megalora.tiny import make_tiny

ROOT = Path(__file__).parents[1]
GLOBAL_BATCH = 1024
ROW_TOKENS = 2048
FORMAT = {"prompt": "question", "completion": "answer"}
RESULTS = ROOT / "benchmarks" / "results" / "packing.json"
SPEED_STEPS = 6
SPEED_BATCH = 32
PADDED_SAMPLES = 8
"""Samples of a padded microbatch; packed rows get as many tokens as these have on average."""


def lengths_of(data: str, tokenizer: Path) -> np.ndarray:
    """[samples] tokens that each sample takes in a row."""
    split = load_split(data, load_tokenizer(tokenizer), format=FORMAT, max_length=ROW_TOKENS)
    return split.sample_lengths - 1


def fill_of(
    lengths: np.ndarray, dp: int, stages: int, packed: bool, *, chunks: int = 1, scale: int = 1
) -> dict[str, Any]:
    """Shares of slots and time over one epoch, at ``GLOBAL_BATCH`` samples a step.

    Args:
        chunks: of each stage; more than one are interleaved.
        scale: what lengths of samples and rows are multiplied by, for packed rows.
    """
    tokens = 0
    slots = 0
    useful = []
    seconds = []
    for step in range(len(lengths) // GLOBAL_BATCH):
        numbers = global_batch_indices(step, GLOBAL_BATCH, len(lengths), 0)
        of_step = (lengths[numbers] * scale).tolist()
        if packed:
            multiple = stages if chunks > 1 else 1
            one_length = stages > 1
            began = time.perf_counter()
            packed_rows = rows_by_tokens(
                of_step, ROW_TOKENS * scale, dp, multiple, one_length=one_length
            )
            seconds.append(time.perf_counter() - began)
            fill = measure_fill(packed_rows, of_step, one_length=one_length, padded=chunks > 1)
            slots += fill.slots
            tokens += fill.tokens
            useful.append(fill.useful_time)
            continue
        # Padded: samples of a microbatch are as long as its longest, and ranks wait for the longest
        # microbatch of a round.
        rows = rows_by_count(GLOBAL_BATCH, PADDED_SAMPLES, dp)
        tokens += sum(of_step)
        for of_round in zip(*rows, strict=True):
            longest = max(of_step[i] for row in of_round for i in row)
            slots += dp * PADDED_SAMPLES * longest
    return {
        "rows": f"{ROW_TOKENS * scale} tokens" if packed else f"{PADDED_SAMPLES} samples, padded",
        "dp": dp,
        "stages": stages,
        "chunks": chunks,
        "slots_used": tokens / slots,
        "useful_time": statistics.fmean(useful) if useful else None,
        "packing_ms": 1e3 * statistics.fmean(seconds) if seconds else None,
    }


def fill(data: str, tokenizer: Path) -> list[dict[str, Any]]:
    """Every arrangement of ``GLOBAL_BATCH`` samples that is measured."""
    lengths = lengths_of(data, tokenizer)
    print(
        f"{len(lengths):,} samples: mean {lengths.mean():.0f} tokens, longest {lengths.max():,}",
        file=sys.stderr,
    )
    rows = []
    for dp in (1, 8, 32):
        rows.append(fill_of(lengths, dp, 1, packed=True))
        rows.append(fill_of(lengths, dp, 1, packed=False))
    for scale in (1, 16):
        rows.append(fill_of(lengths, 8, 2, packed=True, scale=scale))
        rows.append(fill_of(lengths, 8, 2, packed=True, chunks=2, scale=scale))
    return rows


def train(checkout: Path, base: Path, data: str, out: Path, rows: list[str]) -> dict[str, Any]:
    """Train a few steps with a checkout's own code; losses and the median step's speed."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{checkout}:{checkout / 'kernels'}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    config = out.with_suffix(".yaml")
    config.write_text(
        f"model: {{path: {base}, dtype: float32}}\n"
        f"data: {{train: {data}, format: {json.dumps(FORMAT)}, max_length: {ROW_TOKENS}}}\n"
        f"train: {{steps: {SPEED_STEPS}, global_batch_size: {SPEED_BATCH}, check_base: 'off'}}\n"
        f"checkpoint: {{dir: {out}}}\n"
        "log: {tensorboard: false, progress: false}\n"
    )
    command = [sys.executable, "-m", "megalora", "train", str(config), *rows]
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # The first step includes what runs once.
    speeds = [record["tokens_per_second"] for record in records[1:]]
    return {
        "losses": [record["loss"] for record in records],
        "tokens_per_second": statistics.median(speeds),
    }


def speed(data: str, padded_checkout: Path, turns: int, folder: Path) -> list[dict[str, Any]]:
    """Packed and padded runs turn by turn."""
    base = make_tiny(folder / "base", hidden_size=256, num_hidden_layers=4)
    capacity = int(lengths_of(data, base).mean()) * PADDED_SAMPLES
    # A row must hold the longest sample.
    capacity = max(capacity, ROW_TOKENS)
    arms = {
        "packed": (ROOT, [f"train.micro_batch_tokens={capacity}"]),
        "padded": (padded_checkout, [f"train.micro_batch_size={PADDED_SAMPLES}"]),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for turn in range(turns):
        for name, (checkout, rows) in arms.items():
            run = train(checkout, base, data, folder / f"{name}{turn}", rows)
            print(f"{name}: {run['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
            found[name].append(run)
    result = []
    reference = found["padded"][0]["losses"]
    for name, runs in found.items():
        differences = []
        for ours, theirs in zip(runs[0]["losses"], reference, strict=True):
            differences.append(abs(ours / theirs - 1))
        result.append(
            {
                "arm": name,
                "tokens_per_second": [run["tokens_per_second"] for run in runs],
                "largest_loss_difference": max(differences),
                "losses": runs[0]["losses"],
            }
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what packing gives")
    parser.add_argument("what", choices=("fill", "speed"))
    parser.add_argument("data", help="GSM8K's train.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="folder; without it that of a tiny model")
    parser.add_argument("--padded", type=Path, help="checkout of a commit that pads (for speed)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    data = str(Path(args.data).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.what == "fill":
            rows = fill(data, args.tokenizer or make_tiny(folder / "base"))
        else:
            if args.padded is None:
                parser.error("speed needs --padded: a checkout of a commit that pads")
            rows = speed(data, args.padded.resolve(), args.turns, folder)
    kept: list[dict[str, Any]] = []
    if args.out.exists():
        # What the other command measured stays.
        before = json.loads(args.out.read_text())["rows"]
        kept = [row for row in before if ("arm" in row) == (args.what == "fill")]
    for row in rows:
        print(json.dumps(row))
    save("packing", [*kept, *rows], args.out)


if __name__ == "__main__":
    main()
