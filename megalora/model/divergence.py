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

from megalora.model.chunk_logits import logits_of
from megalora.model.vocab_logits import Reader, VocabLogits, columns_of, top_k


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
        chunk = chunk.at(self.temperature)
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


def distance_from_top(
    divergence: Divergence, ids_NK: Tensor, logprobs_NK: Tensor, rest_N: Tensor
) -> Reader:
    """The same from the K tokens that a teacher finds most probable, at the same temperature: the
    distance of two distributions over these and one outcome more, "any other token". It is at most
    that of the whole distributions.

    Args:
        ids_NK: int64.
        logprobs_NK: the teacher's log-probabilities.
        rest_N: log of the teacher's probability of all other tokens.
    """

    def read(chunk: VocabLogits) -> Tensor:
        ids_CK = ids_NK[chunk.rows]
        student = chunk.at(divergence.temperature)
        listed = student.of(ids_CK) - student.logsumexp[:, None]
        both = torch.cat([listed, _rest(student, ids_CK)[:, None]], dim=-1)
        teacher = torch.cat([logprobs_NK[chunk.rows], rest_N[chunk.rows, None]], dim=-1)
        # Alike on every rank: nothing is summed over the vocabulary any more.
        return divergence.of_part(both, teacher.to(both.dtype))

    return read


def top_of(k: int, temperature: float) -> Reader:
    """What ``distance_from_top`` wants of a teacher: a reader with results ``[N, k]``
    log-probabilities, ``[N, k]`` int64 token ids and ``[N]``, the log of the rest's probability."""
    top = top_k(k)

    def read(chunk: VocabLogits) -> tuple[Tensor, ...]:
        chunk = chunk.at(temperature)
        logprobs, ids = top(chunk)
        return logprobs, ids, _rest(chunk, ids)

    return read


def _rest(chunk: VocabLogits, ids_CK: Tensor) -> Tensor:
    """[C]: log of the probability of all tokens but these. One less the sum of these would lose all
    digits of a small rest."""
    columns, here = columns_of(ids_CK, chunk.first, chunk.width)
    # A column behind the last takes the tokens of other ranks.
    listed = torch.zeros(len(ids_CK), chunk.width + 1, dtype=torch.bool, device=ids_CK.device)
    listed.scatter_(1, torch.where(here, columns, chunk.width), True)
    others = chunk.logits.masked_fill(listed[:, :-1], -torch.inf)
    return chunk.gather(others.logsumexp(-1)).logsumexp(0) - chunk.logsumexp
