"""Choose each next token from logits: the most probable one, or one drawn.

Draws come from one stream of numbers per sequence, so that what a sequence says depends neither on
the others of its batch nor on the layout. A draw u in [0, 1) picks from the cumulative sum of the
probabilities, in falling order: the first token whose sum exceeds u.

Legend: N sequences, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from megalora.generate.options import Sampling


class Draws:
    """Uniform numbers for the answer with this number; the same for the same seed and number."""

    def __init__(self, seed: int, number: int) -> None:
        # Counter-based: streams of different keys do not overlap.
        self._bits = np.random.Philox(key=np.array([seed, number], dtype=np.uint64))

    def next(self) -> float:
        """A number in [0, 1)."""
        # From raw bits, as numpy freezes bit generators alone across versions; a float64 has 53.
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53


def ranked(logits_NV: Tensor, options: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities to draw from, float64 ``[N, V]`` in falling order, and their tokens, ``[N, V]``
    int64.

    What ``top_k`` and ``top_p`` leave out has probability 0; the rest is not normalised again.
    """
    scaled_NV = logits_NV.double() / options.temperature
    # Stable, so that equal logits have an order.
    sorted_NV, ids_NV = scaled_NV.sort(dim=-1, descending=True, stable=True)
    if options.top_k:
        sorted_NV[:, options.top_k :] = -torch.inf
    # Over what ``top_k`` has left: ``top_p`` counts shares of these, as in transformers and vLLM.
    probs_NV = sorted_NV.softmax(-1)
    # A token stays if those before it do not have ``top_p`` yet: the first always does.
    before_NV = probs_NV.cumsum(-1) - probs_NV
    return probs_NV.where(before_NV < options.top_p, 0.0), ids_NV


def choose(
    logits_NV: Tensor, draws: list[Draws], options: Sampling, *, tempered: bool = False
) -> tuple[Tensor, Tensor]:
    """The next token of each sequence, ``[N]`` int64, and its log-probability under the model,
    ``[N]`` float32: without temperature, ``top_k`` and ``top_p``.

    Args:
        logits_NV: float32, on any device.
        draws: of each sequence; a greedy choice takes none from them.
        tempered: have log-probabilities of logits / temperature, which a policy gradient of what is
            drawn needs; of a greedy choice they stay those of the model.
    """
    if options.temperature == 0:
        # The first of equal logits, as transformers takes it.
        chosen_N = logits_NV.argmax(-1)
    else:
        probs_NV, ids_NV = ranked(logits_NV, options)
        cumulative_NV = probs_NV.cumsum(-1)
        numbers = torch.tensor([stream.next() for stream in draws], dtype=torch.float64)
        # Scaled instead of normalising V probabilities.
        wanted_N1 = numbers.to(logits_NV.device)[:, None] * cumulative_NV[:, -1:]
        # The first whose sum is above: never one of probability 0.
        places_N1 = torch.searchsorted(cumulative_NV, wanted_N1, right=True)
        # Past the end only where logits are NaN, which the log-probability shows.
        places_N1 = places_N1.clamp(max=logits_NV.shape[1] - 1)
        chosen_N = ids_NV.gather(1, places_N1)[:, 0]
    # What training and a server report of a text, and what a policy gradient needs.
    divisor = options.temperature if tempered and options.temperature else 1.0
    logprobs_NV = (logits_NV.float() / divisor).log_softmax(-1)
    return chosen_N, logprobs_NV.gather(1, chosen_N[:, None])[:, 0]
