"""Check that token ids which somebody else's engine gave are ids of this model."""

import numpy as np

from megalora.config.checks import require
from megalora.data.samples import StoredSamples
from megalora.data.splits import Split


def check_vocabulary(split: Split | None, vocab: int) -> None:
    """Raise ``ValueError`` for a rollout with a token that the model does not have.

    Ids of text come from the model's own tokenizer. Of an id beyond the embedding a GPU says no
    more than that an index was wrong.
    """
    if split is None or split.policy is None or not isinstance(split.samples, StoredSamples):
        return
    largest = split.samples.record_of("largest")
    wrong = np.flatnonzero(largest >= vocab)
    require(
        not len(wrong),
        f"{split.source} has token ids beyond the model's {vocab:,}, up to"
        f" {largest.max(initial=0):,}, in {len(wrong):,} of its rollouts: they were sampled from"
        " another model",
    )
