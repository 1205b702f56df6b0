"""Read what a loss needs from a chunk's logits, of which each rank has its part of the vocabulary.

A reader is a function of ``VocabLogits`` that returns a tensor, or a tuple of tensors, with a row
for each of the chunk's C tokens. ``head.py`` calls it chunk by chunk, in forward and again in
backward, and joins the rows.

    reader           result    equation, with l the logits of a token and p = softmax(l)
    logprob          [C]       l_y - lse
    logsumexp        [C]       lse = log sum_v exp l_v
    mean_logit       [C]       sum_v l_v / V
    entropy          [C]       - sum_v p_v log p_v
    logprobs_of(ids) [C, K]    l_k - lse
    top_k(k)         [C, k]    the k largest log-probabilities, and the token ids they belong to

All are differentiable but for the ids. Legend: C tokens of the chunk, N tokens of the call, V
vocabulary, K tokens that are asked for, /t divided over the tensor-parallel group.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.comm import gather_seq, sum_over


@dataclass(frozen=True, eq=False)
class VocabLogits:
    """Logits of a chunk of tokens on one rank.

    A reader computes with ``logits`` what concerns this rank's part of the vocabulary and joins the
    parts by ``sum`` or ``gather``, as often as it likes: what they return may go into the final
    result or back into a computation over the vocabulary. What the reader returns must be alike on
    every rank. Backward goes through the mean of the ranks' results: the exact transpose of each
    step, where a rule such as "pass the gradient on" would hold for one of the two uses alone.
    """

    logits: Tensor
    """[C, V/t], float32 or wider. Readers share it: none may write into it."""
    targets: Tensor | None
    """[C] int64: the tokens y that came; None where the caller gave none."""
    rows: slice
    """The chunk's place among the N tokens of the call, for columns that a reader brings along."""
    group: ProcessGroup
    """Ranks that share the vocabulary, in order."""

    def at(self, temperature: float) -> "VocabLogits":
        """The chunk with logits / T, in float32 or wider as they are: a model that samples at this
        temperature."""
        # Not kept with the chunk: a teacher's would then outlive its reader.
        return self if temperature == 1 else replace(self, logits=self.logits / temperature)

    @property
    def width(self) -> int:
        """Vocabulary entries on this rank."""
        return self.logits.shape[1]

    @property
    def first(self) -> int:
        """Token id of this rank's first column."""
        return self.group.rank() * self.width

    @property
    def vocab(self) -> int:
        """Entries of the whole vocabulary."""
        return self.group.size() * self.width

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's part; any shape."""
        return sum_over(part, self.group)

    def gather(self, part: Tensor) -> Tensor:
        """Every rank's part, ``[C, ...]`` -> ``[t, C, ...]``."""
        return gather_seq(part[None], self.group)

    @cached_property
    def logsumexp(self) -> Tensor:
        """[C]: log of the sum of exponentials over the whole vocabulary."""
        return self.gather(self.logits.logsumexp(-1)).logsumexp(0)

    def of(self, ids: Tensor) -> Tensor:
        """Logits of given tokens, ids ``[C, K]`` -> ``[C, K]``."""
        columns, here = columns_of(ids, self.first, self.width)
        # Each id lies on one rank; the others add zero.
        own = self.logits.gather(1, columns)
        return self.sum(own.masked_fill(~here, 0.0))


Reader = Callable[[VocabLogits], Tensor | tuple[Tensor, ...]]


def columns_of(ids: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """(this rank's column of each token, whether it lies here); a column of another rank's token is
    any valid one."""
    columns = ids - first
    here = (columns >= 0) & (columns < width)
    return columns.clamp(0, width - 1), here


def logprob(chunk: VocabLogits) -> Tensor:
    """[C]: log-probability of the token that came."""
    assert chunk.targets is not None, "logprob needs the tokens that came"
    return chunk.of(chunk.targets[:, None])[:, 0] - chunk.logsumexp


def logsumexp(chunk: VocabLogits) -> Tensor:
    """[C]."""
    return chunk.logsumexp


def mean_logit(chunk: VocabLogits) -> Tensor:
    """[C]: over the whole vocabulary."""
    return chunk.sum(chunk.logits.sum(-1)) / chunk.vocab


def entropy(chunk: VocabLogits) -> Tensor:
    """[C], in nats."""
    logprobs = chunk.logits - chunk.logsumexp[:, None]
    # Terms of one sign: lse - sum p l would cancel where the model is sure.
    return -chunk.sum((logprobs.exp() * logprobs).sum(-1))


def at_temperature(reader: Reader, temperature: float) -> Reader:
    """The same of a model that samples at this temperature."""
    # Itself, which the head may know a faster way for.
    if temperature == 1:
        return reader
    return lambda chunk: reader(chunk.at(temperature))


def logprobs_of(ids_NK: Tensor) -> Reader:
    """Log-probabilities of K tokens at each of the call's N places, such as those that a teacher
    has given: a reader with result ``[N, K]``."""

    def read(chunk: VocabLogits) -> Tensor:
        return chunk.of(ids_NK[chunk.rows]) - chunk.logsumexp[:, None]

    return read


def top_k(k: int) -> Reader:
    """The k most probable tokens at each place: a reader with results ``[N, k]`` log-probabilities
    in falling order and ``[N, k]`` int64 token ids.

    Among equal logits, which are kept is not defined and may depend on the layout.

    Raises:
        ValueError: (by the reader) the vocabulary has fewer than k entries.
    """

    def read(chunk: VocabLogits) -> tuple[Tensor, Tensor]:
        if not 0 < k <= chunk.vocab:
            raise ValueError(f"top_k: k={k} must be from 1 to the vocabulary's {chunk.vocab:,}")
        # The k largest of all are among the k largest of each part.
        own, columns = chunk.logits.topk(min(k, chunk.width), dim=-1)
        # [t, C, k'] -> [C, t k']
        candidates = chunk.gather(own).transpose(0, 1).flatten(1)
        ids = chunk.gather(columns + chunk.first).transpose(0, 1).flatten(1)
        largest, places = candidates.topk(k, dim=-1)
        return largest - chunk.logsumexp[:, None], ids.gather(1, places)

    return read
