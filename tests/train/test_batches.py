"""Check the rows that each data-parallel rank makes of a step, and what is said of them."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megalora.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megalora.data.batch import FILLER, Batch
from megalora.data.chat import Encoded
from megalora.data.pack import measure_fill, rows_by_tokens
from megalora.data.splits import Split
from megalora.planner.packing import Packing
from megalora.train.batches import Batches

ROW_TOKENS = 700


def rows_of(
    parallel: ParallelConfig, lengths: list[int], dp: int
) -> tuple[list[Batches], list[Batch]]:
    """Every rank's ``Batches``, and all rows of step 0, of samples of these lengths."""
    samples = []
    for number, length in enumerate(lengths):
        ids = np.arange(length, dtype=np.int32) * (number + 1) % 499
        samples.append(Encoded(ids, np.ones(len(ids), dtype=bool)))
    split = Split("test", 1024, samples)
    config = RunConfig(
        model=ModelConfig(path="tiny"),
        data=DataConfig(train="data.jsonl", max_length=ROW_TOKENS),
        train=TrainConfig(steps=1, global_batch_size=len(lengths), micro_batch_tokens=ROW_TOKENS),
        parallel=parallel,
    )
    ranks = []
    rows = []
    for rank in range(dp):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: dp)
        groups: Any = SimpleNamespace(dp=group)
        ranks.append(Batches(config, groups, split, None))
        rows += ranks[-1].of_step(0)
    return ranks, rows


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tp=2, cp=2), ParallelConfig(pp=2), ParallelConfig(pp=2, vpp=2, cp=2)],
    ids=["flat", "stages", "interleaved"],
)
# One sample for three ranks: two have none.
@pytest.mark.parametrize("num_samples", [1, 17])
def test_what_is_said_to_run_is_what_runs(parallel: ParallelConfig, num_samples: int) -> None:
    lengths = [20 + number * 97 % 600 for number in range(num_samples)]
    ranks, rows = rows_of(parallel, lengths, dp=3)
    computed = sum(len(row.tokens) for row in rows)
    # The last token of a sample is only a label.
    held = sum(length - 1 for length in lengths)
    for batches in ranks:
        said = batches.use_of_slots(0)
        assert said["filler"] == pytest.approx(1 - held / computed)
        # No rank computes more than ranks wait for.
        assert said["slots_used"] <= 1 - said["filler"] + 1e-12


@pytest.mark.parametrize("parallel", [ParallelConfig(pp=2), ParallelConfig(pp=2, vpp=2)])
def test_stages_pack_as_the_planner_says(parallel: ParallelConfig) -> None:
    # Short samples and every third a long one: attention makes rows of even cost differ in length.
    lengths = [60 + number * 37 % 90 for number in range(200)]
    lengths[::3] = [400 + number * 53 % 200 for number in range(67)]
    ranks, _ = rows_of(parallel, lengths, dp=2)
    use = Packing(tuple(length - 1 for length in lengths), "test").use(ROW_TOKENS, 2, parallel)
    said = ranks[0].use_of_slots(0)
    assert said["slots_used"] == pytest.approx(use.used)
    inputs = [length - 1 for length in lengths]
    alone = rows_by_tokens(inputs, ROW_TOKENS, 2, parallel.round_multiple)
    fill = measure_fill(alone, inputs, one_length=True)
    assert use.used > fill.tokens / fill.slots


def test_filler_of_interleaved_stages_is_short_and_varied() -> None:
    # One sample and two rounds: the second row is filler, as long as the sample.
    _, (first, row) = rows_of(ParallelConfig(pp=2, vpp=2), [600], dp=1)
    length = len(first.tokens)
    assert len(row.tokens) == length == 599
    assert not row.loss_mask.any()
    # Attention costs with the square of a document.
    assert sum((end - start) ** 2 for start, end in pairwise(row.ends)) <= FILLER * length
    # The sample's own first tokens, here all different: each comes once in a document.
    assert row.tokens.bincount().max() == len(row.ends) - 1 == 3
