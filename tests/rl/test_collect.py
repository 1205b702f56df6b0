"""Which prompts are begun when, and which completions a round trains on."""

import asyncio
import random
import time
from collections import Counter
from concurrent.futures import CancelledError
from itertools import count
from typing import Any

import pytest

from megalora.rl.collect import MOST_DRAWS, Collector, Plan
from megalora.rl.episode import Episode, Prompt


def prompt(number: int) -> Prompt:
    return Prompt(number, {}, [1], "", "")


def episode(asked: Prompt, place: int, version: int = 0, reward: float = 0.0) -> Episode:
    return Episode(asked, place, [7], [-1.0], [1], [version], False, "", reward, {})


def asked_of(groups: list[list[Episode]]) -> list[int]:
    """The number of each group's prompt."""
    return [group[0].prompt.number for group in groups]


class Played:
    """Episodes that take a while, of the version that is current when they begin."""

    def __init__(self, groups: int, staleness: int) -> None:
        self.version = 0
        self.begun: set[int] = set()
        self.limit = groups * (staleness + 1)
        self.too_many = False
        self.seconds = random.Random(0)

    async def __call__(self, asked: Prompt, place: int) -> Episode:
        self.begun.add(asked.number)
        self.too_many |= len(self.begun) > self.limit
        version = self.version
        # One in seven is ten times slower.
        await asyncio.sleep(self.seconds.random() * (0.02 if asked.number % 7 else 0.2))
        return episode(asked, place, version)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_no_completion_is_older_than_allowed(staleness: int) -> None:
    played = Played(3, staleness)
    prompts = map(prompt, count())
    trained: list[int] = []
    oldest = 0
    with Collector(played, prompts, Plan(3, 2, staleness), lambda group: True) as collector:
        for round in range(8):
            played.version = round
            played.limit = 3 * (round + staleness + 1)
            taken = collector.begin_round(round).result(10)
            assert len(taken.groups) == 3 and not taken.left_out
            for group in taken.groups:
                assert [one.sample for one in group] == [0, 1]
                assert len({one.prompt.number for one in group}) == 1
                trained.append(group[0].prompt.number)
                oldest = max(oldest, round - min(one.versions[0] for one in group))
    assert not played.too_many and oldest <= staleness
    # It is used where it is allowed, and slow ones are neither lost nor asked twice.
    assert oldest > 0 or staleness == 0
    assert len(set(trained)) == len(trained)
    if staleness == 0:
        assert trained == list(range(24))


def test_another_prompt_takes_the_place_of_one_that_teaches_nothing() -> None:
    async def play(asked: Prompt, place: int) -> Episode:
        await asyncio.sleep(0.001 * (asked.number % 3))
        return episode(asked, place, reward=asked.number * place)

    def differ(group: list[Episode]) -> bool:
        return group[0].prompt.number % 4 != 0

    prompts = map(prompt, count())
    with Collector(play, prompts, Plan(3, 2), differ) as collector:
        first = collector.begin_round(0).result(10)
        second = collector.begin_round(1).result(10)
    # The first so many prompts of which enough are kept, whatever order they end in.
    assert asked_of(first.groups) == [1, 2, 3]
    assert asked_of(first.left_out) == [0]
    assert asked_of(second.groups) == [5, 6, 7]
    assert sorted(second.prompts) == [4, 5, 6, 7]


def test_rewards_that_teach_nothing_end_the_run() -> None:
    async def play(asked: Prompt, place: int) -> Episode:
        return episode(asked, place)

    prompts = map(prompt, count())
    with (
        Collector(play, prompts, Plan(2, 2), lambda group: False) as collector,
        pytest.raises(
            ValueError, match=f"{2 * MOST_DRAWS + 1} prompts in a row have completions of"
        ),
    ):
        collector.begin_round(0).result(10)


def test_the_first_failure_ends_the_round_and_all_that_is_asked() -> None:
    asking: Counter[int] = Counter()

    async def play(asked: Prompt, place: int) -> Episode:
        asking[asked.number] += 1
        try:
            if (asked.number, place) == (1, 1):
                raise ValueError("the reward of row 1 is no number")
            await asyncio.sleep(10)
        finally:
            asking[asked.number] -= 1
        return episode(asked, place)

    async def still_asked() -> int:
        # Other groups have been told, and end as soon as they can.
        await asyncio.sleep(0)
        return asking.total()

    prompts = map(prompt, count())
    with Collector(play, prompts, Plan(3, 2), lambda group: True) as collector:
        with pytest.raises(ValueError, match="the reward of row 1 is no number"):
            # Without waiting for the others.
            collector.begin_round(0).result(5)
        # Its siblings have ended before it is told, and the other groups right after it.
        assert asking[1] == 0
        assert collector.run(still_asked()).result(5) == 0
        evaluated = [prompt(1), prompt(1), prompt(7)]
        tell = {"place": 0}

        async def third_fails(asked: Prompt, place: int) -> Episode:
            tell["place"] += 1
            return await play(asked, 1 if asked.number == 1 and tell["place"] == 2 else 0)

        with pytest.raises(ValueError, match="the reward of row 1"):
            collector.play_all(evaluated, third_fails).result(5)
        assert asking.total() == 0 and tell["place"] == 3


def test_whoever_waits_for_a_round_is_cancelled_with_it() -> None:
    async def play(asked: Prompt, place: int) -> Episode:
        await asyncio.sleep(10)
        return episode(asked, place)

    prompts = map(prompt, count())
    with Collector(play, prompts, Plan(3, 2), lambda group: True) as collector:
        waiting = [collector.begin_round(0), collector.play_all([prompt(9)], play)]
        while not collector._state.running:
            time.sleep(0.001)
        collector.cancel()
        for future in waiting:
            with pytest.raises((CancelledError, RuntimeError)):
                future.result(5)


def test_what_no_round_has_taken_is_told() -> None:
    async def play(asked: Prompt, place: int) -> Episode:
        return episode(asked, place)

    def is_odd(group: list[Episode]) -> bool:
        return group[0].prompt.number % 2 == 1

    prompts = map(prompt, count())
    with Collector(play, prompts, Plan(2, 2, staleness=1), is_odd) as collector:
        taken = collector.begin_round(0).result(5)
        while collector._state.running:
            time.sleep(0.001)
        every = asked_of(taken.groups + taken.left_out + collector.rest())
        # Of four that may be begun, two are trained on; even ones are left out.
        assert sorted(every) == [0, 1, 2, 3, 4, 5, 6, 7]
        assert asked_of(collector.rest()) == sorted(asked_of(collector.rest()))


@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemError("ended")])
def test_whatever_an_episode_ends_in_the_round_does_not_wait(error: BaseException) -> None:
    async def play(asked: Prompt, place: int) -> Episode:
        raise error

    prompts = (prompt(number) for number in count())
    with (
        Collector(play, prompts, Plan(2, 2), lambda group: True) as collector,
        pytest.raises((RuntimeError, SystemError), match="was cancelled|ended"),
    ):
        collector.begin_round(0).result(5)


def test_a_resumed_run_begins_no_more_than_one_that_went_on() -> None:
    begun: Counter[int] = Counter()

    async def play(asked: Prompt, place: int) -> Episode:
        begun[asked.number] += 1
        return episode(asked, place)

    # Prompts 9 and 11 were done with before; 8 and 10 had been begun and were lost.
    prompts = (prompt(number) for number in count() if number not in {*range(8), 9, 11})
    with Collector(play, prompts, Plan(5, 1, staleness=1), lambda group: True, 2) as collector:
        taken = collector.begin_round(2).result(10)
        found: Any = collector.play_all([prompt(99)], play).result(10)
    assert asked_of(taken.groups) == [8, 10, 12, 13, 14]
    assert sum(begun.values()) == 10 + 1 and found[0].prompt.number == 99
