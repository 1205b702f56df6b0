"""Judge completions by several weighted rewards."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from megalora.rl.rewards.failures import Failures
from megalora.rl.rewards.load import OPTION, Reward, as_number, check_rewards, load_reward
from megalora.rl.rewards.pool import Failed, Pool
from megalora.rl.user_function import is_theirs, without_exit


@dataclass(frozen=True)
class Judged:
    """What rewards say of a completion."""

    total: float | None
    """Weighted sum; None where a reward leaves the completion out, or failed."""
    by_name: dict[str, float]
    """Each reward that gave a number, by its path, before weights."""
    failed: bool = False
    """Whether it is left out because a reward failed, which ``Failures`` has counted."""


class Rewards:
    """Rewards by path, each with its weight; ``async with`` starts and ends their processes."""

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        workers: int = 4,
        timeout_s: float = 30.0,
        failures: Failures | None = None,
    ) -> None:
        """
        Args:
            weights: path of a reward -> its weight; see ``load_reward``.
            workers: processes that call the plain functions.
            timeout_s: seconds that one call of a reward may take.
            failures: what to do where a reward fails; ends the run by default.
        Raises:
            ValueError: see ``check_rewards``.
        """
        check_rewards(weights)
        self.weights = dict(weights)
        self.timeout_s = timeout_s
        self.failures = failures or Failures()
        self._rewards: dict[str, Reward] = {}
        in_processes: list[str] = []
        for path in weights:
            self._rewards[path] = load_reward(path)
            if self._rewards[path].runs == "process":
                in_processes.append(path)
        self._pool = Pool(in_processes, workers, timeout_s)

    async def __aenter__(self) -> Self:
        try:
            await self._pool.start()
        except Failed as error:
            # Its own path and option are in it, where a module could be loaded here and not there.
            raise ValueError(f"{OPTION}: a process cannot load the rewards: {error}") from None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._pool.stop()

    async def judge(
        self, asked: str, completion: str, expected: str, row: dict[str, Any]
    ) -> Judged:
        """What the rewards say of a completion; all of them are called at once.

        Args:
            asked: text of the last message before the answer.
            completion: text of the answer.
            expected: text of the row's own answer; "" where it has none.
            row: of the data.
        Raises:
            ValueError: a reward failed and ``failures`` ends the run; names reward and row.
        """
        arguments = (asked, completion, expected, row)
        calls = [self._call(path, arguments) for path in self.weights]
        # All are waited for, so that none runs on without anybody to hear of it.
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        by_name: dict[str, float] = {}
        total = 0.0
        left_out = False
        for (path, weight), outcome in zip(self.weights.items(), outcomes, strict=True):
            if isinstance(outcome, Failed):
                self.failures.met(OPTION, path, str(outcome), row)
                return Judged(None, {}, failed=True)
            # A bug of ours, or the task was cancelled.
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is None:
                # The others' numbers are still logged.
                left_out = True
                continue
            by_name[path] = outcome
            total += weight * outcome
        return Judged(None if left_out else total, by_name)

    async def _call(
        self, path: str, arguments: tuple[str, str, str, dict[str, Any]]
    ) -> float | None:
        reward = self._rewards[path]
        # There the value is checked where it is made: anything else may not fit through a pipe.
        if reward.runs == "process":
            return await self._pool.call(path, *arguments)
        try:
            # An async function only begins here.
            value = reward.judge(*arguments)
            if reward.runs == "loop":
                value = await self._within_time(value)
        except Failed:
            raise
        except BaseException as error:
            if not is_theirs(error):
                raise
            raise Failed(reward.why(error)) from error
        try:
            return as_number(value)
        except ValueError as error:
            raise Failed(str(error)) from None

    async def _within_time(self, call: Any) -> Any:
        """The result of an async reward."""
        task = asyncio.ensure_future(without_exit(call))
        try:
            done, _ = await asyncio.wait({task}, timeout=self.timeout_s)
        finally:
            # Cancelled and not waited for: it may go on whatever it is told.
            task.cancel()
        if not done:
            raise Failed(f"took longer than {self.timeout_s:g} s")
        return task.result()
