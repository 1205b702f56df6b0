"""Keep track of the prompts of one rank: which wait, which are being answered, which are done."""

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megalora.generate.choose import Draws
from megalora.generate.options import Sampling


@dataclass(frozen=True)
class Answer:
    """What was generated behind one prompt."""

    tokens: list[int]
    """The token that ended the answer included."""
    logprobs: list[float]
    """Of each token, under the model: without temperature, ``top_k`` and ``top_p``."""
    ended: bool
    """Whether a stop token ended it; otherwise it was cut at ``max_new_tokens``."""
    routes: np.ndarray | None = None
    """[tokens of prompt and answer but the last, L, K] int16: the experts that each of the model's
    L layers with experts chose; None where nobody asked."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as it waits."""

    place: int
    """Its place among all prompts."""
    stream: int
    """Number of its stream of draws."""
    tokens: Sequence[int]


@dataclass(eq=False)
class Active:
    """A sequence that is being generated."""

    place: int
    """The prompt's place among all prompts."""
    slot: int
    """Its place in the cache."""
    tokens: list[int]
    """Prompt and answer."""
    num_prompt: int
    draws: Draws
    num_cached: int = 0
    """Leading tokens whose keys and values are in the cache."""
    logprobs: list[float] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)
    """Of each pass so far, where they are kept."""

    @property
    def new_tokens(self) -> list[int]:
        """What the next pass reads: the whole prompt at first, then the last token."""
        return self.tokens[self.num_cached :]


class Sequences:
    """The prompts of one data-parallel rank. A sequence that ends leaves its slot to the next
    prompt, so that passes stay full while prompts wait."""

    def __init__(
        self,
        prompts: Iterable[Prompt],
        options: Sampling,
        stop: Collection[int],
        num_slots: int,
        pass_tokens: int,
    ) -> None:
        """
        Args:
            prompts: in the order in which they are begun.
            stop: tokens that end an answer.
            num_slots: sequences that are generated at the same time, at most.
            pass_tokens: tokens that a pass reads, at most, unless one prompt alone has more.
        """
        self.waiting = deque(prompts)
        self.options = options
        self.stop = frozenset(stop)
        self.free = list(range(num_slots))
        self.pass_tokens = pass_tokens
        self.active: list[Active] = []
        self.answers: dict[int, Answer] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything left to generate."""
        return bool(self.waiting or self.active)

    def of_next_pass(self) -> list[Active]:
        """The sequences that the next pass reads: all active ones, and new ones for free slots."""
        # Those that were active before read one token each.
        room = self.pass_tokens - len(self.active)
        while self.waiting and self.free:
            # In order: a long prompt must not wait for ever behind shorter ones that still fit.
            prompt = self.waiting[0]
            num_tokens = len(prompt.tokens)
            if self.active and num_tokens > room:
                break
            self.waiting.popleft()
            room -= num_tokens
            draws = Draws(self.options.seed, prompt.stream)
            slot = self.free.pop()
            active = Active(prompt.place, slot, list(prompt.tokens), num_tokens, draws)
            self.active.append(active)
        return list(self.active)

    def take(self, sequences: Sequence[Active], tokens: list[int], logprobs: list[float]) -> None:
        """Append what a pass has chosen, and take out the sequences that end with it; raises
        ``ValueError`` where the model's logits were no numbers."""
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            if math.isnan(logprob):
                raise ValueError(
                    f"prompt {sequence.place}: the logits behind token {len(sequence.tokens)} are"
                    " NaN; the base or the adapter has diverged, or the dtype is too narrow for it"
                )
            # All but the token that is appended now: no pass has read that yet.
            sequence.num_cached = len(sequence.tokens)
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            ended = token in self.stop
            if ended or len(sequence.logprobs) == self.options.max_new_tokens:
                answer = sequence.tokens[sequence.num_prompt :]
                routes = np.concatenate(sequence.routes) if sequence.routes else None
                self.answers[sequence.place] = Answer(answer, sequence.logprobs, ended, routes)
                self.active.remove(sequence)
                self.free.append(sequence.slot)


def keep_routes(sequences: Sequence[Active], routes: np.ndarray) -> None:
    """Give each sequence the routes of the tokens that a pass has read of it; before ``take``.

    Args:
        sequences: those of the pass, in the order of its row.
        routes: [T, L, K] int16, of all tokens of the row.
    """
    start = 0
    for sequence in sequences:
        end = start + len(sequence.new_tokens)
        # A copy: a view would keep the whole pass alive.
        sequence.routes.append(routes[start:end].copy())
        start = end
