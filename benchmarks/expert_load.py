"""Measure what counting tokens per expert costs a training step, on this CPU.

    python -m benchmarks.expert_load [--steps N]

Trains a model of 12 layers of 64 experts, 8 a token, on one rank, and adds up the processor time
of what only counted steps do: taking notes in the layers, the sum behind the step, entropy,
starved experts and the record of a whole run's size. Processor time of the one thread, not the
clock's, so that a busy machine changes nothing. Prints JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import tests.conftest  # noqa: F401  sets up the host before anything from Megatron is imported
from megalora.data.arithmetic import write_arithmetic
from megalora.model.expert_load import ExpertLoad
from megalora.tiny import make_tiny
from megalora.train.assemble import assemble
from megalora.train.expert_tokens import ExpertTokens, evenness
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config

MODEL = {
    "num_hidden_layers": 12, "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 64,
    "num_experts_per_tok": 8,
}  # fmt: skip


class Timed:
    """Processor seconds of functions while a block runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.thread_time() - start

        return timed


def measure(folder: Path, num_steps: int) -> dict[str, Any]:
    """One rank: seconds of counted steps, and of counting in them; the first step is left out."""
    base = make_tiny(folder / "base", **MODEL)
    write_arithmetic(folder / "chats.jsonl", 400, seed=0)
    config = make_config(base, folder / "chats.jsonl", folder / "run", {}, global_batch_size=32)
    counting = Timed()
    file = ExpertTokens(folder, list(range(MODEL["num_hidden_layers"])), MODEL["num_experts"])
    file.open(0, num_steps, 1)
    add = counting.around(ExpertLoad.add)
    total = counting.around(ExpertLoad.total)
    with (
        assemble(config) as run,
        mock.patch.object(ExpertLoad, "add", add),
        mock.patch.object(ExpertLoad, "total", total),
    ):
        run.step(0, 1e-3, count_experts=True)
        counting.seconds = 0.0
        start = time.process_time()
        for number in range(1, num_steps + 1):
            run.step(number, 1e-3, count_experts=True)
            counts = run.expert_tokens
            assert counts is not None
            counting.around(evenness)(counts)
            counting.around(file.write)(number, counts)
        all_seconds = time.process_time() - start
        tokens = sum(run.batches.num_tokens(number) for number in range(1, num_steps + 1))
    assert int(np.sum(counts)) > 0
    return {
        "tokens_per_step": tokens / num_steps,
        "step_cpu_ms": 1e3 * all_seconds / num_steps,
        "counting_cpu_ms": 1e3 * counting.seconds / num_steps,
        "counting_percent": 100 * counting.seconds / all_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        [found] = run_ranks(measure, 1, Path(folder), steps)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
