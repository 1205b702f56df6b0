"""Check that training and ``megalora bench`` say how many rows per expert they expect.

On that depends whether the experts' weights get room for adapters: a benchmark that says nothing
would measure another model than the one that trains.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest

from megalora.bench import steps
from megalora.bench.rows import BenchOptions
from megalora.config import RunConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.train import assemble, loop
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config


class Seen(Exception):
    """Ends a run where its model would be built."""


def expected_by(start: Callable[[], None]) -> float:
    """What the model is built for, in a run that ``start`` begins."""
    rows: list[float] = []

    # In place of what builds the model, which says for how many rows per expert it is built.
    def build(*args: Any, rows_per_expert: float = 0.0, **how: Any) -> None:
        rows.append(rows_per_expert)
        raise Seen

    with mock.patch.object(assemble, "build_adapted", build), suppress(Seen):
        start()
    return rows[0]


def expected_by_training(config: RunConfig) -> float:
    def start() -> None:
        loop.train(config)

    return expected_by(start)


def expected_by_bench(config: RunConfig, weights: Literal["real", "random"]) -> float:
    def start() -> None:
        with steps.training(config, BenchOptions(weights=weights)):
            pass

    return expected_by(start)


@pytest.fixture
def config(tiny: Path, chats: Path, tmp_path: Path) -> RunConfig:
    return make_config(tiny, chats, tmp_path / "run", {}, micro_batch_size=4)


def wanted(config: RunConfig) -> float:
    """4 samples of at most 256 tokens, of which each goes to top-k of the experts."""
    shape = model_shape(read_hf_config(Path(config.model.path)))
    return 4 * 256 * shape.top_k / shape.num_experts


def test_training_expects_the_rows_of_its_config(config: RunConfig) -> None:
    # Not zero, which is what an argument that is left out means.
    assert run_ranks(expected_by_training, 1, config) == [wanted(config)] != [0]


# A benchmark needs no weights: with random ones it builds the model from config.json alone.
@pytest.mark.parametrize("weights", ["real", "random"])
def test_bench_expects_the_rows_of_its_config(weights: str, config: RunConfig) -> None:
    assert run_ranks(expected_by_bench, 1, config, weights) == [wanted(config)]
