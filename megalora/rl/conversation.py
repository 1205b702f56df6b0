"""Hold a conversation with the model: what an environment has in its hands.

The tokens are those that the engine read and sampled, in one row; see ``new_text.py`` for what is
tokenised.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalora.data.messages import Message, cleaned
from megalora.rl.episode import Ask, Prompt, Sampled
from megalora.rl.new_text import NewText


class Truncated(Exception):
    """The conversation cannot go on: a length limit cut the last answer, or is reached."""


class EngineFailed(Exception):
    """The engine did not answer; its own error is the cause."""


@dataclass(frozen=True)
class Reply:
    """An answer of the model."""

    text: str
    """Without special tokens."""
    ended: bool
    """Whether the model ended it; otherwise a length limit did, and nothing can follow."""


class Client:
    """One conversation, which begins behind the prompt of a row."""

    def __init__(
        self, prompt: Prompt, ask: Ask, new_text: NewText, max_length: int, timeout_s: float
    ) -> None:
        """
        Args:
            max_length: tokens of prompt and completion together, at most.
            timeout_s: seconds that the environment may take between two answers.
        """
        self.messages: list[Message] = []
        """All that was said behind the prompt."""
        self.completion_ids: list[int] = []
        self.logprobs: list[float | None] = []
        self.mask: list[int] = []
        self.versions: list[int] = []
        self.routes: np.ndarray | None = None
        self.truncated = False
        self.engine_error: Exception | None = None
        """Kept, because the environment's own code may swallow it."""
        self._prompt = prompt
        self._ask = ask
        self._new_text = new_text
        self._max_length = max_length
        self._timeout_s = timeout_s
        self._clock: asyncio.Timeout | None = None
        self._waiting: list[Message] = []
        self._is_asking = False

    def add(self, messages: str | Message | Sequence[Message]) -> None:
        """Say something before the next answer. Nothing of it is learned.

        Args:
            messages: a text of the user, or messages with role and content.
        Raises:
            ValueError: a message has no role or no content.
        """
        if isinstance(messages, str):
            messages = {"role": "user", "content": messages}
        for message in [messages] if isinstance(messages, dict) else messages:
            number = len(self.messages) + 1
            new, _ = cleaned(message, number, lambda: self._new_text.template.joiner)
            self.messages.append(new)
            # Tokenised with the next answer: what nothing follows teaches nothing.
            self._waiting.append(new)

    async def generate(self, messages: str | Message | Sequence[Message] | None = None) -> Reply:
        """Have the model answer: the prompt at first, then what was added.

        Args:
            messages: added before.
        Raises:
            Truncated: the answer before was cut, or there is no room for another token.
            ValueError: nothing was added since the last answer, something was added before the
                first one, another answer is still awaited, or the template refuses the messages.
        """
        if messages is not None:
            self.add(messages)
        # Behind half an answer the template has nothing to write.
        if self.truncated:
            raise Truncated
        self._require_a_turn()
        given: list[int] = []
        # The prompt ends where the first answer begins: nothing stands between the two.
        if self.completion_ids:
            given = self._new_text.tokens(self._waiting, self.completion_ids[-1])
        tokens = [*self._prompt.tokens, *self.completion_ids, *given]
        room = self._max_length - len(tokens)
        if room <= 0:
            # What would have been given is left out, too: nothing would follow it.
            self.truncated = True
            raise Truncated
        sampled = await self._sample(tokens)
        # Only now: an engine that failed has read none of it.
        self._waiting = []
        return self._take(given, sampled, room)

    def _require_a_turn(self) -> None:
        if self._is_asking:
            raise ValueError("client.generate: another answer of this conversation is awaited")
        if self.completion_ids and not self._waiting:
            raise ValueError("client.generate: nothing was added since the last answer")
        if self._waiting and not self.completion_ids:
            raise ValueError(
                "client.generate: the prompt ends where the assistant answers; nothing can be added"
                " before the first answer"
            )

    async def _sample(self, tokens: list[int]) -> Sampled:
        """Ask the engine; its time is not the environment's."""
        self._is_asking = True
        # Many episodes wait for an engine at the same time.
        self._set_clock(None)
        try:
            return await self._ask(tokens)
        except Exception as error:
            self.engine_error = error
            raise EngineFailed from error
        finally:
            self._is_asking = False
            self._set_clock(self._timeout_s)

    def _take(self, given: list[int], sampled: Sampled, room: int) -> Reply:
        """Append what was given and what was sampled behind it."""
        num_read = len(self._prompt.tokens) + len(self.completion_ids)
        # The engine knows the limit of an answer, not that of the conversation.
        ids = sampled.tokens[:room]
        self.completion_ids += [*given, *ids]
        self.mask += [0] * len(given) + [1] * len(ids)
        self.logprobs += [*([None] * len(given)), *sampled.logprobs[:room]]
        if given:
            # Something was sampled before whatever was given.
            self.versions += [self.versions[-1]] * len(given)
        self.versions += sampled.versions[:room]
        self._take_routes(sampled.routes, num_read)
        self.truncated = not sampled.ended or len(ids) < len(sampled.tokens)
        # For the environment and the rewards; training reads the tokens.
        tokenizer: Any = self._new_text.template.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        return Reply(text, not self.truncated)

    def _take_routes(self, routes: np.ndarray | None, num_read: int) -> None:
        """Keep the routes of tokens that were not read before: those of earlier ones are of the
        adapter that sampled behind them."""
        # The prompt's own tokens are read with the first answer.
        is_first = num_read == len(self._prompt.tokens)
        if routes is None or (self.routes is None and not is_first):
            # Of a part nothing can be replayed.
            self.routes = None
            return
        length = len(self._prompt.tokens) + len(self.completion_ids) - 1
        assert len(routes) >= length, f"routes of {len(routes)} tokens, {length} were read"
        # The last token of the answer before had not been read yet.
        new = routes[num_read - 1 : length]
        self.routes = routes[:length] if self.routes is None else np.concatenate([self.routes, new])

    def _set_clock(self, seconds: float | None) -> None:
        if self._clock is not None:
            # On the loop's own clock, as a time and not as a duration.
            now = asyncio.get_running_loop().time()
            self._clock.reschedule(None if seconds is None else now + seconds)

    def start_clock(self, clock: asyncio.Timeout) -> None:
        """The time limit of the environment, which stands still while the engine answers."""
        self._clock = clock
        self._set_clock(self._timeout_s)
