"""Measure how long a run takes from its imports to its first batch, with and without a token store.

    python -m benchmarks.token_start --chats 100000 --out start.json
    python -m benchmarks.token_start --data train.jsonl --model Qwen/Qwen3-30B-A3B

Each start is a process of its own: the first one tokenises, the second finds the store. What is
timed is what a rank does of its data: load the tokenizer, find the samples, digest them for the
checkpoint, make the first rows. The file is in the page cache, as behind a download.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megalora.versions import commit

WORDS = (
    "the",
    "model",
    "reads",
    "a",
    "text",
    "from",
    "left",
    "to",
    "right",
    "token",
    "by",
    "token",
)


def write_chats(path: Path, count: int) -> None:
    """Write conversations of one to three turns, about 200 tokens of the tiny model's tokenizer."""
    drawn = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            messages = []
            for _ in range(drawn.randint(1, 3)):
                question = " ".join(drawn.choices(WORDS, k=drawn.randint(5, 20)))
                answer = " ".join(drawn.choices(WORDS, k=drawn.randint(5, 60)))
                messages.append({"role": "user", "content": f"{number}: {question}?"})
                messages.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": messages}) + "\n")


def start(data: str, model: str, cache: str, workers: int | None) -> dict[str, Any]:
    """Go from imports to the first batch as a rank does; returns seconds of each part."""
    began = time.perf_counter()
    from megalora import host

    # Before anything from Megatron, as in a run.
    host.install()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from megalora.config import DataConfig, ModelConfig, RunConfig, TrainConfig
    from megalora.data.splits import load_data
    from megalora.data.tokenizer import load_tokenizer
    from megalora.hf.folder import local_folder
    from megalora.train.batches import Batches
    from megalora.train.checkpoint.identity import Samples

    config = RunConfig(
        model=ModelConfig(path=model),
        data=DataConfig(train=data, eval=0.01, cache=cache, workers=workers),
        train=TrainConfig(steps=10, global_batch_size=64),
    )
    seconds: dict[str, Any] = {}

    def done(part: str) -> None:
        """Note the seconds since the last part was done."""
        now = time.perf_counter()
        seconds[part] = now - began - sum(seconds.values())

    # transformers imports classes when they are first asked for.
    assert AutoTokenizer and PreTrainedTokenizerFast
    done("imports_s")
    tokenizer = load_tokenizer(local_folder(model, weights=False))
    done("tokenizer_s")
    train, held_out = load_data(config.data, tokenizer)
    done("samples_s")
    Samples.of(train.samples)
    done("digest_s")
    groups: Any = SimpleNamespace(dp=SimpleNamespace(rank=lambda: 0, size=lambda: 1))
    rows = Batches(config, groups, train, held_out).of_step(0)
    done("first_batch_s")
    seconds["after_imports_s"] = sum(seconds.values()) - seconds["imports_s"]
    seconds["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**seconds, "samples": len(train.samples), "tokens": train.num_tokens, "rows": len(rows)}


def _in_a_process(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.token_start", "--one", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(chats: int, data: str | None, model: str | None, workers: int | None) -> dict[str, Any]:
    """The first and the second start on a file, or on made-up chats for the tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = f"{folder}/chats.jsonl"
            write_chats(Path(data), chats)
        if model is None:
            from megalora.tiny import make_tiny

            model = f"{folder}/tiny"
            make_tiny(Path(model))
        arguments = [data, model, f"{folder}/cache", *([str(workers)] if workers else [])]
        starts = [_in_a_process(arguments) for _ in ("first", "second")]
        store = sum(path.stat().st_size for path in Path(folder, "cache").rglob("*.bin"))
    return {
        "benchmark": "token_start",
        "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "numpy")},
        "commit": commit(),
        "store_bytes": store,
        "first": starts[0],
        "second": starts[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chats", type=int, default=100_000, help="made-up conversations")
    parser.add_argument("--data", help="a source to use instead")
    parser.add_argument("--model", help="folder of the tokenizer instead of the tiny model's")
    parser.add_argument("--workers", type=int, help="data.workers")
    parser.add_argument("--out", type=Path, help="file for the record")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        data, model, cache, *workers = args.one
        print(json.dumps(start(data, model, cache, int(workers[0]) if workers else None)))
        return
    record = json.dumps(measure(args.chats, args.data, args.model, args.workers), indent=1)
    print(record)
    if args.out:
        args.out.write_text(record + "\n")


if __name__ == "__main__":
    main()
