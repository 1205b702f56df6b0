"""Compute log-probabilities of a fixed text in training, which each checkpoint keeps: a server that
loads it must repeat them."""

from typing import Any

import numpy as np

from megalora.config import ParallelConfig
from megalora.data.batch import flat_row
from megalora.data.chat import Encoded
from megalora.train.step import Stepper


class Probe:
    """The fixed text, and its run through the model in training."""

    def __init__(self, tokens: list[int], dtype: str, parallel: ParallelConfig) -> None:
        self.tokens = tokens
        self.dtype = dtype
        sample = Encoded(np.array(tokens, dtype=np.int32), np.ones(len(tokens), dtype=bool))
        row = flat_row([sample], filler=sample.input_ids, multiple_of=parallel.row_multiple)
        self.batches = [row] * parallel.round_multiple

    def run(self, stepper: Stepper) -> dict[str, Any]:
        """What ``probe.json`` holds: log-probability of tokens[1:], each given those before it;
        collective over the world."""
        # The cross entropy of token i against token i + 1 is minus its log-probability; the last
        # token has no next one.
        losses = stepper.token_losses(self.batches)[: len(self.tokens) - 1]
        return {
            "tokens": self.tokens,
            "logprobs": [-loss for loss in losses.tolist()],
            "dtype": self.dtype,
        }
