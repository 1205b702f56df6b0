"""Play an episode: one answer, or the conversation that an environment of the user's leads."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from megalora.data.template import ChatTemplate
from megalora.rl.conversation import Client, Truncated
from megalora.rl.episode import Ask, Episode, Prompt
from megalora.rl.new_text import NewText
from megalora.rl.rewards.failures import Failures
from megalora.rl.rewards.judge import Judged, Rewards
from megalora.rl.rewards.load import as_number, is_async
from megalora.rl.user_function import describe, is_theirs, load_function

OPTION = "rl.environment"
VERIFIERS = "verifiers:"
"""Begins the name of an environment of that package."""
OWN = "environment"
"""Name of the reward where an environment returns a number."""
Rollout = Callable[[Client, dict[str, Any]], Awaitable[Any]]
"""``async def rollout(client, row)``: leads a conversation, and returns its reward, several by
name, or None where the rewards of ``rl.rewards`` alone judge."""


async def one_answer(client: Client, row: dict[str, Any]) -> None:
    """The environment where none is given."""
    await client.generate()


def load_environment(path: str | None) -> Rollout:
    """The environment at a path, ``module:function`` or ``file.py:function``; None for one answer.

    Raises:
        ValueError: one line: there is none, it takes other arguments than a client and a row, or it
            is not an ``async def``.
    """
    if path is None:
        return one_answer
    if path.startswith(VERIFIERS):
        return _of_verifiers(path)
    function = load_function(OPTION, path, ("client", "row"))
    if not is_async(function):
        raise ValueError(
            f"{OPTION}: {path} is not async; write async def and await client.generate"
        )
    return function


def _of_verifiers(path: str) -> Rollout:
    # Late: it is an extra, and takes seconds to import.
    try:
        from megalora.rl import of_verifiers
    except ImportError as error:
        raise ValueError(
            f"{OPTION}: {path}: {error}; install it: pip install 'megalora[verifiers]'"
        ) from None
    try:
        return of_verifiers.Rollout(path.removeprefix(VERIFIERS))
    except ValueError as error:
        raise ValueError(f"{OPTION}: {path}: {error}") from None


class Environment:
    """Plays episodes."""

    def __init__(
        self,
        path: str | None,
        rewards: Rewards,
        template: ChatTemplate,
        *,
        max_length: int,
        timeout_s: float = 30.0,
    ) -> None:
        """
        Args:
            path: see ``load_environment``.
            rewards: judge the completion's text beside the environment; may be none at all.
            max_length: tokens of prompt and completion together, at most.
            timeout_s: seconds that the environment may take before, between and after answers.
        Raises:
            ValueError: there is no such environment.
        """
        # For messages: what could not be judged is named by it.
        self.path = path or "one answer"
        self.rollout = load_environment(path)
        self.rewards = rewards
        self.template = template
        self.max_length = max_length
        self.timeout_s = timeout_s

    @property
    def failures(self) -> Failures:
        """What to do where the environment fails: the same as where a reward does."""
        return self.rewards.failures

    async def play(self, prompt: Prompt, sample: int, ask: Ask) -> Episode:
        """One completion of a prompt, judged.

        Args:
            sample: its place in the prompt's group.
            ask: has the engine sample; it bounds the tokens of an answer.
        Raises:
            ValueError: a reward or the environment failed, and failures end the run.
        """
        new_text = NewText(self.template, prompt.conversation)
        client = Client(prompt, ask, new_text, self.max_length, self.timeout_s)
        own = await self._lead(client, prompt)
        if not client.completion_ids:
            # It failed before the first answer, and is left out. Records have tokens all the same.
            client = Client(prompt, ask, new_text, self.max_length, self.timeout_s)
            await client.generate()
        # All turns, what tools said included.
        tokenizer: Any = self.template.tokenizer
        text = tokenizer.decode(client.completion_ids, skip_special_tokens=True)
        judged = Judged(None, {})
        # Of a completion that is left out nobody needs to know more.
        if own is not None and self.rewards.weights:
            judged = await self.rewards.judge(prompt.asked, text, prompt.expected, prompt.row)
        return Episode(
            prompt=prompt,
            sample=sample,
            completion_ids=client.completion_ids,
            logprobs=client.logprobs,
            mask=client.mask,
            versions=client.versions,
            truncated=client.truncated,
            text=text,
            reward=self._total(own, judged),
            rewards={**(own or {}), **judged.by_name},
            routes=client.routes,
        )

    def _total(self, own: dict[str, float] | None, judged: Judged) -> float | None:
        """The reward; None where nothing judged the completion, or one left it out."""
        if own is None or (self.rewards.weights and judged.total is None):
            return None
        # The environment has given none, and there is nothing else to judge.
        if not own and not self.rewards.weights:
            return None
        # The weights of rl.rewards are for its own alone.
        return sum(own.values()) + (judged.total or 0.0)

    async def _lead(self, client: Client, prompt: Prompt) -> dict[str, float] | None:
        """Rewards of the environment by name, which may be none; None where the completion is left
        out."""
        reason = ""
        own: dict[str, float] = {}
        clock = asyncio.timeout(None)
        try:
            async with clock:
                # From here on; it stands still while the engine answers.
                client.start_clock(clock)
                said = await self.rollout(client, prompt.row)
            # What cannot be taken is a failure of the environment like an exception.
            own, reason = _by_name(said)
        except Truncated:
            # It has not come to a judgement; the rewards may.
            pass
        # It is the user's program: anything may go wrong in it.
        except BaseException as error:
            if not is_theirs(error):
                raise
            # A time-out of the environment's own is an error like others.
            is_late = isinstance(error, TimeoutError) and clock.expired()
            limit = f"took longer than {self.timeout_s:g} s between two answers"
            reason = limit if is_late else describe(error)
        # Not the environment's fault, whatever it made of it.
        if client.engine_error is not None:
            raise client.engine_error
        # There would be nothing to judge, and nothing to learn from.
        if not (reason or client.completion_ids):
            reason = "ended without an answer: await client.generate()"
        if reason:
            self.failures.met(OPTION, self.path, reason, prompt.row)
            return None
        return own


def _by_name(said: Any) -> tuple[dict[str, float], str]:
    """What an environment returned, as rewards by name; and why not, where it is something else."""
    # A single number has a name, too: rewards are logged by name.
    several = said if isinstance(said, Mapping) else {OWN: said}
    named: dict[str, float] = {}
    for name, value in several.items():
        try:
            number = as_number(value)
        except ValueError as error:
            return {}, f"{name}: {error}" if several is said else str(error)
        # A single None leaves the judgement to rl.rewards.
        if number is not None:
            named[name] = number
        elif several is said:
            return {}, f"{name}: gave None; where there are several, each is a number"
    return named, ""
