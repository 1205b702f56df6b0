"""Check batches on their way to the device, and lengths that stages know without asking."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalora.config import RunConfig
from megalora.data.batch import FILLER, Batch, flat_row
from megalora.data.chat import Encoded
from megalora.model.documents import zigzag
from megalora.train.inputs import Asked, Part, to_device
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.gradients import reduced_gradients
from tests.parity.runs import make_config


def batch(lengths: tuple[int, ...], seed: int) -> Batch:
    """A row of documents of random tokens, labels and mask."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    # Qwen's vocabulary has 151,936 tokens: numbers that 16 bits do not hold.
    tokens = torch.randint(0, 151_936, (total,), generator=generator)
    labels = torch.randint(0, 151_936, (total,), generator=generator)
    mask = torch.randint(0, 2, (total,), generator=generator).float()
    return Batch(tokens, labels, mask, (0, *accumulate(lengths)))


@pytest.mark.parametrize(
    ("first", "last"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_what_arrives_is_what_was_sent(first: bool, last: bool) -> None:
    batches = [batch((7, 3), 0), batch((5,), 1), batch((2, 1, 9), 2)]
    arrived = to_device(batches, Part(first, last))
    assert len(arrived) == len(batches)
    # Of all labels, as the probe wants them.
    in_full = to_device(batches, Part(first, last), Asked(every_token=True))
    for sent, found, full in zip(batches, arrived, in_full, strict=True):
        assert full.positions is None
        places = sent.loss_mask.nonzero().flatten()
        for wanted, tensor, expected in (
            (first, found.tokens, sent.tokens),
            (last, found.labels, sent.labels[places]),
            (last, found.positions, places),
            (first, full.tokens, sent.tokens),
            (last, full.labels, sent.labels),
        ):
            # A stage between the ends needs neither tokens nor labels: nothing is sent for it.
            if not wanted:
                assert tensor is None
                continue
            assert tensor is not None
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)
        # Attention in every stage needs documents.
        assert len(found.documents.positions) == len(sent.tokens)
        ((query_ends, key_ends),) = found.documents.bounds
        assert query_ends.tolist() == key_ends.tolist() == list(sent.ends)
        assert query_ends.dtype == torch.int32


@pytest.mark.parametrize("cp_size", [1, 2])
def test_sequences_of_target_tokens(cp_size: int) -> None:
    """Every part of a row knows which sequence each of its target tokens belongs to, and how many
    the whole row has."""
    lengths = (7, 6, 3)
    row = batch((*lengths, 4), 0)
    # The last document is filler.
    row.loss_mask[-4:] = 0
    row = replace(row, filler=4)
    whole = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    numbers = whole[row.loss_mask[:-4] > 0]
    expected = torch.bincount(numbers, minlength=3)
    found = torch.zeros(3, dtype=torch.int64)
    for rank in range(cp_size):
        part = Part(False, True, cp_rank=rank, cp_size=cp_size)
        (arrived,) = to_device([row], part, Asked(sequences=True))
        assert arrived.sequences is not None and arrived.targets is not None
        assert arrived.positions is not None
        assert torch.equal(arrived.targets, expected)
        own = zigzag(torch.arange(len(row.tokens)), rank, cp_size)[arrived.positions]
        assert torch.equal(arrived.sequences, whole[own])
        found += torch.bincount(arrived.sequences, minlength=3)
    assert torch.equal(found, expected)
    # Nothing of it is sent where nobody asks.
    (plain,) = to_device([row], Part(True, True))
    assert plain.sequences is None and plain.targets is None


def test_labels_travel_with_their_sequences() -> None:
    """Also numbers that are not whole; rows of filler have none."""
    samples: list[Encoded] = []
    for value in (1.0, 0.0, -2.75):
        ids = np.arange(3, dtype=np.int32)
        samples.append(Encoded(ids, np.array([False, True, True]), value=value))
    rows = [flat_row(part, filler=np.arange(9)) for part in (samples, [], samples[1:])]
    arrived = to_device(rows, Part(False, True), Asked(sequences=True))
    found = [one.values.tolist() for one in arrived if one.values is not None]
    assert found == [[1.0, 0.0, -2.75], [], [0.0, -2.75]]


def test_ranks_of_context_parallelism_get_the_parts_of_a_row() -> None:
    # 16 tokens in 8 chunks of 2; rank 1 of 4 has chunks 1 and 6.
    row = batch((7, 9), 3)
    row.loss_mask[:] = 1
    row.loss_mask[3] = 0
    (found,) = to_device([row], Part(True, True, cp_rank=1, cp_size=4))
    assert found.tokens is not None and found.labels is not None
    assert found.tokens.tolist() == row.tokens[[2, 3, 12, 13]].tolist()
    # Targets alone, by their places among the rank's own four tokens.
    assert found.labels.tolist() == row.labels[[2, 12, 13]].tolist()
    assert found.positions is not None
    assert found.positions.tolist() == [0, 2, 3]
    # Places 12 and 13 are tokens 5 and 6 of the second document, which begins at 7.
    assert found.documents.positions.tolist() == [2, 3, 5, 6]


def losses(config: RunConfig) -> tuple[set[int], list[float]]:
    """Lengths of the first step's microbatches, and the mean loss in training mode and in
    evaluation."""
    with built(config) as run:
        batches = run.batches.of_step(0)
        lengths = {len(batch.tokens) for batch in batches}
        training = run.stepper.train(batches, run.optimizer)[0]
        evaluation = run.stepper.evaluate(batches)[0]
        return lengths, [training, evaluation]


def with_and_without_filler(config: RunConfig) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of a row as it is, and filled up with several documents."""
    found = []
    with built(config) as run:
        samples = run.batches.train.samples[:3]
        for multiple in (1, 3 * FILLER + 5):
            row = flat_row(samples, filler=run.batches.filler, multiple_of=multiple)
            loss, _ = run.stepper.train([row], run.optimizer)
            gradients = reduced_gradients(run.model, run.optimizer)
            assert gradients is not None
            found.append((loss, {name: value.clone() for name, value in gradients.items()}))
        # Some documents of filler, and what remains behind the samples.
        assert len(row.ends) > 3 + 1 + 2
    return found


def test_filler_changes_neither_loss_nor_gradients(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = make_config(tiny, chats, tmp_path, {})
    (loss, gradients), (filled_loss, filled) = run_ranks(with_and_without_filler, 1, config)[0]
    # The same float32 sums, in groups of other sizes.
    assert filled_loss == pytest.approx(loss, rel=1e-6)
    assert any(value.any() for value in gradients.values())
    for name, value in gradients.items():
        torch.testing.assert_close(filled[name], value, rtol=1e-4, atol=1e-6)


def test_stages_know_every_microbatch_s_own_length(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Nothing is padded to the longest of a step, and nothing is asked: the schedule's sizes are
    not the tensors'."""
    options: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": 6}
    lengths, one = run_ranks(losses, 1, make_config(tiny, chats, tmp_path, {}, **options))[0]
    # Were all of one length, stages that assume one could not be told from those that know.
    assert len(lengths) > 3
    two_stages = make_config(tiny, chats, tmp_path, {"pp": 2}, **options)
    for rank_lengths, two in run_ranks(losses, 2, two_stages):
        assert rank_lengths == lengths
        # The same sums in float32, by two processes.
        assert two == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (3, 1), (1, 2), (2, 2), (2, 3)])
@pytest.mark.parametrize("filler", [0, 1, 5, 11, 23, 24])
def test_filler_of_every_rank_is_at_its_end(tp: int, cp: int, filler: int) -> None:
    """A row of 24 tokens, of which every rank has a part; counted token by token."""
    row = Batch(*(torch.zeros(24) for _ in range(3)), (0, 24), filler)
    is_filler = torch.arange(24) >= 24 - filler
    counted = 0
    for cp_rank in range(cp):
        slices = zigzag(is_filler, cp_rank, cp).chunk(tp)
        for tp_rank, mine in enumerate(slices):
            part = Part(True, True, cp_rank, cp, tp_rank, tp)
            found = part.filler(row)
            assert mine.tolist() == [False] * (len(mine) - found) + [True] * found
            counted += found
    assert counted == filler
