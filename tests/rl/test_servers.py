"""Ask servers for completions: whole, from the version that was asked, whatever happens to them."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from megalora.rl import servers as module
from megalora.rl.episode import Sampled
from megalora.rl.servers import Servers, sampled
from megalora.serve.errors import RequestRefused, ServerError, ServerUnreachable
from tests.serve.fake_vllm import FakeVLLM, fake_vllm

IDS = {0: "rl@v0.aa", 1: "rl@v1.bb"}
ANSWERS = {0: [5, 6, 7], 1: [8, 9, 10]}
TOKENS = 3


class Kept:
    """What a publisher has, without training and messages."""

    def __init__(self, servers: list[FakeVLLM]) -> None:
        self.servers = servers
        self.ids = dict(IDS)
        self.restored: list[str] = []

    def id_of(self, version: int) -> str:
        return self.ids[version]

    def restore(self, server: str) -> None:
        self.restored.append(server)
        for fake in self.servers:
            if fake.url == server:
                for version, ident in self.ids.items():
                    fake.adapters.setdefault(ident, ("", ANSWERS[version]))


@pytest.fixture
def fakes() -> Iterator[list[FakeVLLM]]:
    with ExitStack() as stack:
        found = [stack.enter_context(fake_vllm()) for _ in range(2)]
        kept = Kept(found)
        for fake in found:
            kept.restore(fake.url)
        yield found


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a server alone for 0.02 s instead of 1 s."""
    monkeypatch.setattr(module, "FIRST_REST_S", 0.02)
    monkeypatch.setattr(module, "LONGEST_REST_S", 0.04)


def asked(fakes: list[FakeVLLM], kept: Kept, requests: int, **options: Any) -> list[Any]:
    """Answers or errors of so many requests at once, of version 1."""

    async def ask() -> list[Any]:
        servers = Servers([fake.url for fake in fakes], kept, max_new_tokens=TOKENS, **options)
        servers.use(1)
        try:
            return await asyncio.gather(
                *(servers.sample([1, 2, number]) for number in range(requests)),
                return_exceptions=True,
            )
        finally:
            await servers.close()

    return asyncio.run(ask())


def assert_whole(answers: list[Any], version: int = 1) -> None:
    for answer in answers:
        assert isinstance(answer, Sampled), answer
        assert answer.tokens == ANSWERS[version]
        assert answer.logprobs == [-0.5] * TOKENS
        assert answer.versions == [version] * TOKENS
        assert not answer.ended


def test_each_server_gets_half(fakes: list[FakeVLLM]) -> None:
    assert_whole(asked(fakes, Kept(fakes), 8))
    assert [len(fake.asked) for fake in fakes] == [4, 4]


def test_requests_are_shared_out_and_limited(fakes: list[FakeVLLM]) -> None:
    most: Counter[str] = Counter()
    running: Counter[str] = Counter()
    for fake in fakes:
        # One that is ten times slower gets fewer.
        fake.seconds_per_answer = 0.2 if fake is fakes[0] else 0.02
        complete = fake.may_answer.wait

        def counted(*_: Any, url: str = fake.url, complete: Any = complete) -> bool:
            running[url] += 1
            most[url] = max(most[url], running[url])
            time.sleep(0.01)
            running[url] -= 1
            return complete()

        fake.may_answer.wait = counted  # type: ignore[method-assign]
    answers = asked(fakes, Kept(fakes), 24, concurrency=3)
    assert_whole(answers)
    counts = [len(fake.asked) for fake in fakes]
    assert sum(counts) == 24 and counts[0] < counts[1]
    assert max(most.values()) <= 3
    body = fakes[1].asked[0]
    # Nothing of the base's generation_config.json, and no text.
    expected = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    expected |= {"temperature": 1.0, "max_tokens": TOKENS, "logprobs": 0, "model": IDS[1]}
    assert body.items() >= (expected | {"return_token_ids": True}).items()
    assert body["prompt"][:2] == [1, 2]


def test_a_server_that_breaks_costs_no_answer(fakes: list[FakeVLLM]) -> None:
    fakes[0].hang_up = 5
    assert_whole(asked(fakes, Kept(fakes), 12))
    assert len(fakes[1].asked) >= 6


def test_a_server_that_forgot_gets_the_version_back(fakes: list[FakeVLLM]) -> None:
    kept = Kept(fakes)
    fakes[0].adapters.clear()
    assert_whole(asked(fakes, kept, 12))
    assert set(kept.restored) == {fakes[0].url}
    # And answers again.
    assert any(body["model"] == IDS[1] for body in fakes[0].asked[6:])


def test_nobody_answers(fakes: list[FakeVLLM]) -> None:
    for fake in fakes:
        fake.hang_up = 10**6
    answers = asked(fakes, Kept(fakes), 3, patience_s=0.2)
    for answer in answers:
        assert isinstance(answer, ServerUnreachable)
        assert "no server has answered for 0.0 minutes: " in str(answer)
        assert fakes[0].url in str(answer) and fakes[1].url in str(answer)


def test_a_refused_request_is_not_tried_again(fakes: list[FakeVLLM]) -> None:
    async def ask() -> None:
        servers = Servers([fakes[0].url], Kept(fakes), max_new_tokens=TOKENS)
        servers.use(0)
        with pytest.raises(RequestRefused, match="maximum context length"):
            await servers.sample([1] * 1000)
        await servers.close()

    asyncio.run(ask())
    assert len(fakes[0].asked) == 1


def test_a_request_keeps_its_version_through_all_tries(fakes: list[FakeVLLM]) -> None:
    """The newer version is published while the request waits for a server that comes back."""
    kept = Kept(fakes)
    fakes[0].hang_up = 2

    async def ask() -> tuple[Sampled, Sampled]:
        servers = Servers([fakes[0].url], kept, max_new_tokens=TOKENS)
        servers.use(0)
        first = asyncio.create_task(servers.sample([1, 2]))
        while fakes[0].hang_up == 2:
            await asyncio.sleep(0.001)
        servers.use(1)
        second = asyncio.create_task(servers.sample([1, 2]))
        # The first waits for the server, and its version must not go.
        seen = set()
        while not first.done():
            seen |= servers.in_use()
            await asyncio.sleep(0.001)
        assert seen == {0, 1}
        answers = await first, await second
        assert servers.in_use() == {1}
        await servers.close()
        return answers

    first, second = asyncio.run(ask())
    assert_whole([first], 0)
    assert_whole([second], 1)


def test_a_version_that_is_gone_gives_way_to_the_newest(fakes: list[FakeVLLM]) -> None:
    kept = Kept(fakes)
    fakes[0].hang_up = 1

    async def ask() -> Sampled:
        servers = Servers([fakes[0].url], kept, max_new_tokens=TOKENS)
        servers.use(0)
        task = asyncio.create_task(servers.sample([1, 2]))
        while fakes[0].hang_up:
            await asyncio.sleep(0.001)
        del kept.ids[0]
        servers.use(1)
        answer = await task
        await servers.close()
        return answer

    assert_whole([asyncio.run(ask())], 1)


def answer(**changes: Any) -> dict[str, Any]:
    logprobs = {"token_logprobs": changes.pop("logprobs", [-0.5, -0.25, -1.0])}
    choice = {"token_ids": [5, 6, 2], "logprobs": logprobs, "finish_reason": "length"}
    return {"model": "rl@v1.bb", "choices": [choice | changes]}


def test_what_is_not_whole_is_refused_by_name() -> None:
    found = sampled(answer(finish_reason="stop"), "rl@v1.bb", 1, 9, [2], "here")
    assert (found.tokens, found.ended, found.versions) == ([5, 6, 2], True, [1, 1, 1])
    assert not sampled(answer(), "rl@v1.bb", 1, 3, [2], "here").ended
    cases: list[tuple[dict[str, Any], str]] = [
        (answer() | {"model": "base"}, "here was asked, and base has answered"),
        (answer() | {"choices": []}, "no tokens and log-probabilities"),
        (answer(token_ids=None), "0 tokens|no tokens"),
        (answer(token_ids=[5, 6]), "2 tokens with 3 log-probabilities"),
        (answer(logprobs=[-0.5, None, -1.0]), "token 6 has the log-probability None"),
        (answer(logprobs=[-0.5, -0.25, math.nan]), "token 2 has the log-probability nan"),
        (answer(finish_reason="abort"), "ended by 'abort' after 3 of 3 tokens"),
        (answer(finish_reason="stop", token_ids=[5, 6, 7]), "ended by token 7, which ends nothing"),
    ]
    for case, said in cases:
        with pytest.raises(ServerError, match=said):
            sampled(case, "rl@v1.bb", 1, 3, [2], "here")
    # Cut short of the limit.
    with pytest.raises(ServerError, match="ended by 'length' after 3 of 9 tokens"):
        sampled(answer(), "rl@v1.bb", 1, 9, [2], "here")
