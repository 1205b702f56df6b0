"""Compute log-probabilities of a fixed text in training, or its scores where there is a score head.
Each checkpoint keeps them: a server that loads it must repeat them."""

from typing import Any

import numpy as np

from megalora.config import ParallelConfig
from megalora.data.batch import flat_row
from megalora.data.chat import Encoded
from megalora.train.step import Stepper


class Probe:
    """The fixed text, and its run through the model in training."""

    def __init__(
        self, tokens: list[int], dtype: str, parallel: ParallelConfig, num_scores: int = 0
    ) -> None:
        """``num_scores``: numbers that the score head gives; 0 for a language model."""
        self.tokens = tokens
        self.dtype = dtype
        self.num_scores = num_scores
        ids = np.array(tokens, dtype=np.int32)
        mask = np.ones(len(tokens), dtype=bool)
        if num_scores:
            # The last token is scored: the place behind it takes part in nothing.
            ids = np.append(ids, ids[:1])
            mask = np.append(np.zeros_like(mask), True)
        sample = Encoded(ids, mask)
        row = flat_row([sample], filler=sample.input_ids, multiple_of=parallel.row_multiple)
        self.batches = [row] * parallel.round_multiple

    def run(self, stepper: Stepper) -> dict[str, Any]:
        """What ``probe.json`` holds: log-probability of tokens[1:], each given those before it, or
        the scores of the text; collective over the world."""
        if self.num_scores:
            (scores,) = stepper.sequence_scores(self.batches, self.num_scores).tolist()
            return {"tokens": self.tokens, "scores": scores, "dtype": self.dtype}
        # The cross entropy of token i against token i + 1 is minus its log-probability; the last
        # token has no next one.
        losses = stepper.token_losses(self.batches)[: len(self.tokens) - 1]
        return {
            "tokens": self.tokens,
            "logprobs": [-loss for loss in losses.tolist()],
            "dtype": self.dtype,
        }
