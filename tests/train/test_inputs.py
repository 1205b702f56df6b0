"""Check batches on their way to the device, and lengths that stages know without asking."""

from pathlib import Path

import pytest
import torch

from megalora.config import RunConfig
from megalora.data.loader import Batch
from megalora.train.inputs import to_device
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.runs import make_config


def batch(rows: int, length: int, seed: int) -> Batch:
    """A microbatch of random tokens, labels and mask."""
    generator = torch.Generator().manual_seed(seed)
    # Qwen's vocabulary has 151,936 tokens: numbers that 16 bits do not hold.
    tokens = torch.randint(0, 151_936, (rows, length), generator=generator)
    labels = torch.randint(0, 151_936, (rows, length), generator=generator)
    # Labels outside the loss travel as negative numbers; with a plain minus, 0 would lose its mask.
    labels[0, 0] = 0
    return Batch(tokens, labels, torch.randint(0, 2, (rows, length), generator=generator).float())


@pytest.mark.parametrize(
    ("first", "last"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_what_arrives_is_what_was_sent(first: bool, last: bool) -> None:
    batches = [batch(2, 7, 0), batch(3, 5, 1), batch(2, 9, 2)]
    arrived = to_device(batches, first=first, last=last)
    assert len(arrived) == len(batches)
    for sent, found in zip(batches, arrived, strict=True):
        for wanted, tensor, expected in (
            (first, found.tokens, sent.tokens),
            (last, found.labels, sent.labels),
            (last, found.loss_mask, sent.loss_mask),
        ):
            # A stage between the ends needs neither tokens nor labels: nothing is sent for it.
            if not wanted:
                assert tensor is None
                continue
            assert tensor is not None
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)


def losses(config: RunConfig) -> tuple[set[int], list[float]]:
    """Lengths of the first step's microbatches, and the mean loss in training mode and in
    evaluation."""
    with built(config) as run:
        batches = run.batches.of_step(0)
        lengths = {batch.tokens.shape[1] for batch in batches}
        training = run.stepper.train(batches, run.optimizer)[0]
        evaluation = run.stepper.evaluate(batches)[0]
        return lengths, [training, evaluation]


def test_stages_know_every_microbatch_s_own_length(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Nothing is padded to the longest of a step, and nothing is asked: the schedule's sizes are
    not the tensors'."""
    options = {"micro_batch_size": 1, "global_batch_size": 6}
    lengths, one = run_ranks(losses, 1, make_config(tiny, chats, tmp_path, {}, **options))[0]
    # Were all of one length, stages that assume one could not be told from those that know.
    assert len(lengths) > 3
    two_stages = make_config(tiny, chats, tmp_path, {"pp": 2}, **options)
    for rank_lengths, two in run_ranks(losses, 2, two_stages):
        assert rank_lengths == lengths
        # The same sums in float32, by two processes.
        assert two == pytest.approx(one, rel=1e-6)
