"""Log-probabilities of a fixed text by the training side, kept with each checkpoint: a server that
loads it must repeat them."""

from typing import Any

import numpy as np

from megalora.config import ParallelConfig
from megalora.data.chat import Encoded
from megalora.data.loader import collate
from megalora.train.step import Stepper


class Probe:
    """Runs the text through the model in training."""

    def __init__(self, tokens: list[int], dtype: str, parallel: ParallelConfig) -> None:
        self.tokens = tokens
        self.dtype = dtype
        sample = Encoded(np.array(tokens, dtype=np.int32), np.ones(len(tokens), dtype=bool))
        # the interleaved schedule wants that many microbatches
        repeats = parallel.pp if parallel.vpp > 1 else 1
        self.batches = [collate([sample], pad_id=tokens[0], multiple_of=parallel.tp)] * repeats

    def run(self, stepper: Stepper) -> dict[str, Any]:
        """What ``probe.json`` holds: log-probability of tokens[1:], each given those before it;
        collective over the world."""
        losses = stepper.token_losses(self.batches)[0, : len(self.tokens) - 1]
        return {
            "tokens": self.tokens,
            "logprobs": [-loss for loss in losses.tolist()],
            "dtype": self.dtype,
        }
