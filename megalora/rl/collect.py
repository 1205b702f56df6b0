"""Play episodes on the first rank: an event loop in a thread of its own, on which groups of
completions are sampled and judged while the ranks train.

With B groups a round, and round r the next one to be trained on, no more than (staleness + r + 1) B
groups have been begun by then and not been left out (AReaL 2505.24298, section 5.1). That alone
would let a slow group be overtaken for ever, so round r also waits for each that was begun in round
r - staleness: these are B at most, and no completion is older. With a staleness of 0 a round is
sampled as a whole, after the round before it was trained on.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from megalora.rl.episode import Episode, Prompt
from megalora.rl.user_function import is_theirs

MOST_DRAWS = 20
"""Times the groups of a round that may be left out one after the other: then nothing is learned
that would be worth the sampling."""


@dataclass(frozen=True)
class Plan:
    """How many groups there are, and how early they may be begun."""

    groups: int
    """Of a round."""
    size: int
    """Completions of a group."""
    staleness: int = 0
    """Rounds that a group may be begun before the one that trains on it."""


Play = Callable[[Prompt, int], Awaitable[Episode]]
"""Samples and judges one completion of a prompt; the number is its place in the group."""


@dataclass
class _State:
    """Touched on the event loop alone."""

    begun: int
    """Groups that were begun since the run's first step and not left out."""
    round: int
    running: dict[asyncio.Task[None], int] = field(default_factory=dict)
    """Task of a group -> the round that it was begun in."""
    ready: list[tuple[int, list[Episode]]] = field(default_factory=list)
    """(round that it was begun in, group)"""
    left_out: list[list[Episode]] = field(default_factory=list)
    """Since the last round was taken."""
    in_a_row: int = 0
    """Groups that were left out since the last one that was not."""
    failure: BaseException | None = None


class Collector:
    """Groups of judged completions, a round at a time."""

    def __init__(
        self,
        play: Play,
        prompts: Iterator[Prompt],
        plan: Plan,
        is_kept: Callable[[list[Episode]], bool],
        round: int = 0,
    ) -> None:
        """Start the thread.

        Args:
            prompts: in the order in which they are asked.
            is_kept: whether a group is trained on; another prompt takes the place of one that is
                not.
            round: the first one that will be taken. As if all before it had been: a resumed run
                begins no more prompts than one that was never stopped.
        """
        self._play = play
        self._prompts = prompts
        self._plan = plan
        self._is_kept = is_kept
        self._state = _State(begun=round * plan.groups, round=round)
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        # What wait for rounds and evaluations.
        self._waiting: set[asyncio.Task[Any]] = set()
        # A daemon, which cannot keep the process from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def begin_round(self, round: int) -> "Future[Round]":
        """The groups of this round as soon as they are there. What they are sampled from must be
        that of the round by now."""
        return self.run(self._waited_for(self._take(round)))

    def run(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """Run something else on the same event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def play_all(self, prompts: list[Prompt], play: Play) -> "Future[list[Episode]]":
        """One completion of each of these prompts, outside of all rounds, in their order."""

        return self.run(self._waited_for(_together([play(prompt, 0) for prompt in prompts])))

    def cancel(self) -> None:
        """Abandon what is being sampled."""

        async def cancel() -> None:
            # Each ends before the loop does, or Python would complain of lost tasks.
            await _end([*self._state.running, *self._waiting])

        self.run(cancel()).result()

    def rest(self) -> list[list[Episode]]:
        """Groups that are judged and that no round has taken, in the order of their prompts."""

        async def rest() -> list[list[Episode]]:
            ready = [group for _, group in self._state.ready]
            return sorted([*ready, *self._state.left_out], key=_number)

        return self.run(rest()).result()

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _waited_for[T](self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that ``cancel`` abandons."""
        task = asyncio.current_task()
        assert task is not None, "it runs on the event loop"
        self._waiting.add(task)
        try:
            return await work
        finally:
            self._waiting.discard(task)

    async def _take(self, round: int) -> "Round":
        state = self._state
        state.round = round
        self._begin()
        oldest = round - self._plan.staleness
        while (
            len(state.ready) < self._plan.groups
            or min(state.running.values(), default=round + 1) <= oldest
        ):
            if state.failure is not None:
                raise state.failure
            # Nothing would ever change again.
            if not state.running:
                raise RuntimeError("no group is being sampled, and there are too few for a round")
            self._changed.clear()
            await self._changed.wait()
        # The oldest first, then those that were done first; a stable sort keeps that order.
        state.ready.sort(key=lambda begun_and_group: begun_and_group[0] > oldest)
        taken = [group for _, group in state.ready[: self._plan.groups]]
        state.ready = state.ready[self._plan.groups :]
        left_out = state.left_out
        state.left_out = []
        # Within a round in the order of the prompts.
        taken.sort(key=_number)
        return Round(taken, sorted(left_out, key=_number))

    def _begin(self) -> None:
        """Begin as many groups as may be begun."""
        state = self._state
        plan = self._plan
        limit = (plan.staleness + state.round + 1) * plan.groups
        while state.begun < limit and state.failure is None:
            state.begun += 1
            task = self._loop.create_task(self._group(next(self._prompts), state.round))
            state.running[task] = state.round
            task.add_done_callback(self._end)

    def _end(self, task: "asyncio.Task[None]") -> None:
        del self._state.running[task]
        self._changed.set()

    async def _group(self, prompt: Prompt, begun: int) -> None:
        state = self._state
        try:
            places = range(self._plan.size)
            episodes = await _together([self._play(prompt, place) for place in places])
            self._sort(begun, episodes)
        except BaseException as error:
            # A run that ends cancels what is being sampled; anything else must end the round.
            if not is_theirs(error):
                raise
            if isinstance(error, asyncio.CancelledError):
                error = RuntimeError(f"an episode of prompt {prompt.number} was cancelled")
            # The first failure is the one that says why.
            state.failure = state.failure or error
            # No round will be taken any more: nobody needs the other groups.
            for task in state.running:
                if task is not asyncio.current_task():
                    task.cancel()

    def _sort(self, begun: int, group: list[Episode]) -> None:
        """Keep a group for a round, or leave it out and begin another."""
        state = self._state
        if self._is_kept(group):
            state.in_a_row = 0
            state.ready.append((begun, group))
            return
        state.left_out.append(group)
        state.in_a_row += 1
        if state.in_a_row > MOST_DRAWS * self._plan.groups:
            raise ValueError(
                f"{state.in_a_row:,} prompts in a row have completions of which nothing can be"
                f" learned ({_why(state.left_out)}): rewards are too hard or too easy for this"
                " model, or objective.policy.drop_even_groups and drop_truncated leave out too much"
            )
        # Its place in the round is free again.
        state.begun -= 1
        self._begin()


@dataclass(frozen=True)
class Round:
    """What is trained on next."""

    groups: list[list[Episode]]
    """In the order of their prompts."""
    left_out: list[list[Episode]]
    """Groups that were sampled meanwhile and are not trained on."""

    @property
    def prompts(self) -> list[int]:
        """Numbers of all prompts that are done with, in no order."""
        return [_number(group) for group in [*self.groups, *self.left_out]]


async def _together(playing: Sequence[Awaitable[Episode]]) -> list[Episode]:
    """Episodes that are played at once. Where one fails the others end, before its error is raised:
    no request of theirs goes on behind it."""
    tasks = [asyncio.ensure_future(one) for one in playing]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        # Those that are done stay as they are.
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _number(group: list[Episode]) -> int:
    return group[0].prompt.number


def _why(groups: list[list[Episode]]) -> str:
    """What groups that were left out have in common, in words."""
    unjudged = 0
    alike = 0
    cut = 0
    for group in groups:
        rewards = {one.reward for one in group}
        unjudged += rewards == {None}
        alike += len(rewards - {None}) == 1
        cut += all(one.truncated for one in group)
    return (
        f"of {len(groups):,} groups {alike:,} have rewards that are all alike, {unjudged:,} were"
        f" not judged at all, and {cut:,} were cut by the length limit"
    )
