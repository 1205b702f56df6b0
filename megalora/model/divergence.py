"""Compare a student's next-token distribution with a teacher's, of which each rank has its part of
the vocabulary: readers for ``head.py``.

With p = softmax(l / T) of the teacher's logits, q of the student's, m = b p + (1 - b) q:

    forward   KL(p || q) = sum_v p_v (log p_v - log q_v)       Hinton et al. 1503.02531
    reverse   KL(q || p)                                       Gu et al. 2306.08543
    jsd       b KL(p || m) + (1 - b) KL(q || m)                Agarwal et al. 2306.13649, equation 1

The teacher's logits of a chunk are made beside the student's, from the teacher's hidden states: no
rank has those of more tokens, or of more than its own vocabulary entries.

Legend: C tokens of the chunk, N tokens of the call, H hidden size of the teacher, V vocabulary,
/t divided over the tensor-parallel group.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megalora.model.head_chunk import CHUNK_BYTES
from megalora.model.token_logprobs import logits_of
from megalora.model.vocab_logits import Reader, VocabLogits

CHUNK_BYTES_BESIDE_TEACHER = CHUNK_BYTES * 2 // 5
"""Room for the logits of a chunk, of which ``head.py`` counts four tensors in float32: with those
of the teacher, its logarithms, probabilities and products there are ten."""


@dataclass(frozen=True)
class Divergence:
    """Which distance of two distributions, in nats."""

    kind: Literal["forward", "reverse", "jsd"] = "forward"
    beta: float = 0.5
    """Of ``jsd``, the teacher's share of the mixture: between 0 and 1."""
    temperature: float = 1.0
    """Divides the logits of both."""

    def of_part(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The sum over the last dimension, of log-probabilities ``[..., K]`` -> ``[...]``. Summed
        over all parts of the vocabulary it is the distance."""
        if self.kind == "forward":
            return _relative_entropy(teacher, student)
        if self.kind == "reverse":
            return _relative_entropy(student, teacher)
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        of_teacher = self.beta * _relative_entropy(teacher, mixture)
        return of_teacher + (1 - self.beta) * _relative_entropy(student, mixture)

    def log_softmax(self, chunk: VocabLogits) -> Tensor:
        """[C, V/t]: log-probabilities of this rank's entries among all of the vocabulary."""
        if self.temperature != 1:
            chunk = replace(chunk, logits=chunk.logits / self.temperature)
        return chunk.logits - chunk.logsumexp[:, None]


def _relative_entropy(of: Tensor, to: Tensor) -> Tensor:
    """sum p (log p - log q) over the last dimension, of logarithms."""
    return (of.exp() * (of - to)).sum(-1)


def distance_from(divergence: Divergence, hidden_NH: Tensor, weight_VH: Tensor) -> Reader:
    """How far the student is from a teacher at each of the call's N places: a reader with result
    ``[N]``. Its gradient reaches the student alone.

    Args:
        hidden_NH: the teacher's states behind its final norm, on every rank.
        weight_VH: this rank's rows of the teacher's output weight, ``[V/t, H]``.
    """

    def read(chunk: VocabLogits) -> Tensor:
        with torch.no_grad():
            # Rounded to the teacher's dtype first, as its own head rounds them.
            logits = logits_of(hidden_NH[chunk.rows], weight_VH)
            teacher = divergence.log_softmax(replace(chunk, logits=logits))
        student = divergence.log_softmax(chunk)
        return chunk.sum(divergence.of_part(student, teacher))

    return read
