"""Ask servers for completions: whole, from the version that was asked, whatever happens to them."""

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from megalora.rl import servers as module
from megalora.rl.collect import Collector, Plan
from megalora.rl.draft import Draft, lines_of, parts
from megalora.rl.episode import Episode, Prompt, Sampled
from megalora.rl.servers import Servers
from megalora.serve.errors import RequestRefused, ServerError, ServerUnreachable
from tests.serve.fake_vllm import FakeVLLM, fake_vllm, logprob_of

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
            fake.prompt_tokens = 3
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
            answers = asyncio.gather(
                *(servers.sample([1, 2, number]) for number in range(requests)),
                return_exceptions=True,
            )
            # What waits without end must fail its test.
            return await asyncio.wait_for(answers, 60)
        finally:
            await servers.close()

    return asyncio.run(ask())


def assert_whole(answers: list[Any], version: int = 1) -> None:
    for answer in answers:
        assert isinstance(answer, Sampled), answer
        assert answer.tokens == ANSWERS[version]
        assert answer.logprobs == [logprob_of(token) for token in ANSWERS[version]]
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
    # Not a part for each token.
    expected |= {"stream": True, "stream_interval": 32}
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
        # Of a busy machine: it says how long it was.
        assert re.match(r"no server has answered for \d\.\d minutes: ", str(answer))
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


def test_a_request_keeps_its_version_until_it_is_answered(fakes: list[FakeVLLM]) -> None:
    """A newer version is published while the answer comes."""
    kept = Kept(fakes)
    fakes[0].may_answer.clear()

    async def ask() -> tuple[Sampled, Sampled]:
        servers = Servers([fakes[0].url], kept, max_new_tokens=TOKENS)
        servers.use(0)
        first = asyncio.create_task(servers.sample([1, 2, 0]))
        while not fakes[0].asked:
            await asyncio.sleep(0.001)
        servers.use(1)
        second = asyncio.create_task(servers.sample([1, 2, 0]))
        while len(fakes[0].asked) < 2:
            await asyncio.sleep(0.001)
        # Its version must not go meanwhile.
        assert servers.in_use() == {0, 1}
        fakes[0].may_answer.set()
        answers = await first, await second
        assert servers.in_use() == {1}
        await servers.close()
        return answers

    first, second = asyncio.run(ask())
    assert_whole([first], 0)
    assert_whole([second], 1)


def test_an_answer_that_breaks_off_goes_on_with_the_newest_version(fakes: list[FakeVLLM]) -> None:
    """Whatever has come stays, with the version that sampled it; nothing is sampled twice."""
    kept = Kept(fakes)
    fakes[0].break_off = [2]
    fakes[0].may_answer.clear()

    async def ask() -> Sampled:
        servers = Servers([fakes[0].url], kept, max_new_tokens=TOKENS)
        servers.use(0)
        task = asyncio.create_task(servers.sample([1, 2, 0]))
        while not fakes[0].asked:
            await asyncio.sleep(0.001)
        servers.use(1)
        fakes[0].may_answer.set()
        found = await task
        await servers.close()
        return found

    found = asyncio.run(ask())
    assert (found.tokens, found.versions, found.ended) == ([5, 6, 10], [0, 0, 1], False)
    assert found.logprobs == [logprob_of(token) for token in (5, 6, 10)]
    asked = [(body["model"], body["prompt"], body["max_tokens"]) for body in fakes[0].asked]
    assert asked == [(IDS[0], [1, 2, 0], 3), (IDS[1], [1, 2, 0, 5, 6], 1)]


@pytest.mark.parametrize(("stop", "ended"), [((), False), ((10,), True)], ids=["length", "stop"])
def test_an_answer_that_breaks_off_behind_its_last_token_is_whole(
    stop: tuple[int, ...], ended: bool, fakes: list[FakeVLLM]
) -> None:
    # One more would be none of its tokens; vLLM refuses to sample none.
    fakes[0].break_off = [TOKENS]
    fakes[0].finish_reason = None  # type: ignore[assignment]
    (found,) = asked(fakes[:1], Kept(fakes), 1, stop=stop, patience_s=0.2)
    assert (found.tokens, found.ended) == (ANSWERS[1], ended)
    assert len(fakes[0].asked) == 1


def test_an_answer_that_is_aborted_is_sent_on(fakes: list[FakeVLLM]) -> None:
    """As by a server that is shut down."""
    fakes[0].finish_reason = "abort"
    answers = asked(fakes, Kept(fakes), 6)
    assert_whole(answers)
    # The last token was there.
    assert sum(len(fake.asked) for fake in fakes) == 6


VERSIONS = 1000
"""Token ``VERSIONS * v + n`` is the n-th that version v samples."""
LONG = 6


class Publishing:
    """A training that brings a version to two servers before each round."""

    def __init__(self, fakes: list[FakeVLLM], keep: int) -> None:
        self.fakes = fakes
        self.keep = keep
        self.ids: dict[int, str] = {}
        self.servers = Servers([fake.url for fake in fakes], self, max_new_tokens=LONG)

    def id_of(self, version: int) -> str:
        return self.ids[version]

    def restore(self, server: str) -> None:
        raise AssertionError("no server forgets")

    def publish(self, version: int) -> None:
        self.ids[version] = f"rl@v{version}.aa"
        tokens = [VERSIONS * version + place for place in range(LONG)]
        old = set(self.ids) - set(sorted(self.ids)[-self.keep :]) - self.servers.in_use()
        for fake in self.fakes:
            with fake.lock:
                fake.adapters[self.ids[version]] = ("", tokens)
                for gone in old:
                    fake.adapters.pop(self.ids[gone])
        for gone in old:
            del self.ids[gone]
        self.servers.use(version)


def test_of_two_servers_one_is_ten_times_slower(fakes: list[FakeVLLM]) -> None:
    """With a staleness of 2, and answers that break off: each token has the version that sampled
    it, none is older than allowed, none is lost and none sampled twice."""
    staleness = 2
    groups = 3
    training = Publishing(fakes, staleness + 2)
    fakes[0].seconds_per_token = 0.01
    fakes[1].seconds_per_token = 0.001
    begun: set[int] = set()

    async def play(prompt: Prompt, place: int) -> Episode:
        begun.add(prompt.number)
        found = await training.servers.sample([1, prompt.number, place])
        return Episode(
            prompt, place, found.tokens, [*found.logprobs], [1] * LONG, found.versions,
            not found.ended, "", 0.0, {},
        )  # fmt: skip

    prompts = (Prompt(number, {}, [1], "", "") for number in range(VERSIONS))
    episodes: list[Episode] = []
    oldest = 0
    with Collector(play, prompts, Plan(groups, 2, staleness), lambda group: True) as collector:
        for round in range(5):
            # Each server drops connections in the middle of answers, before and behind tokens.
            fakes[round % 2].break_off = [3, 0, 5]
            training.publish(round)
            taken = collector.begin_round(round).result(30)
            assert len(taken.groups) == groups
            for one in [one for group in taken.groups for one in group]:
                episodes.append(one)
                sampled_by = [token // VERSIONS for token in one.completion_ids]
                assert one.versions == sampled_by
                # Each place once, whoever sampled it.
                assert [token % VERSIONS for token in one.completion_ids] == list(range(LONG))
                assert one.logprobs == [logprob_of(token) for token in one.completion_ids]
                assert sampled_by == sorted(sampled_by)
                oldest = max(oldest, round - min(one.versions))
        under_way = collector.run(_rest_of(collector)).result(30)
        collector.run(training.servers.close()).result(30)
    assert 0 < oldest <= staleness
    for fake in fakes:
        assert fake.asked
    # Every completion that was begun is trained on once, or still waits.
    trained = Counter((one.prompt.number, one.sample) for one in episodes)
    assert set(trained.values()) == {1} and len(trained) == 5 * groups * 2
    assert begun == {number for number, _ in trained} | under_way


async def _rest_of(collector: Collector) -> set[int]:
    """Numbers of prompts that were begun and that no round has taken."""
    while collector._state.running:
        await asyncio.sleep(0.001)
    return {group[0].prompt.number for _, group in collector._state.ready}


def answer(**changes: Any) -> dict[str, Any]:
    logprobs = {"token_logprobs": changes.pop("logprobs", [-0.5, -0.25, -1.0])}
    choice = {"token_ids": [5, 6, 2], "logprobs": logprobs, "finish_reason": "length"}
    return {"model": "rl@v1.bb", "choices": [choice | changes]}


def drafted(part: dict[str, Any], max_new_tokens: int = 3, stop: int = 2) -> Sampled:
    """The completion of one part."""
    draft = Draft([1, 2], max_new_tokens, [stop])
    reason = draft.take(part, "rl@v1.bb", 1, "here")
    assert reason is not None
    return draft.sampled(reason, "here")


def test_what_is_not_whole_is_refused_by_name() -> None:
    found = drafted(answer(finish_reason="stop"), 9)
    assert (found.tokens, found.ended, found.versions) == ([5, 6, 2], True, [1, 1, 1])
    assert not drafted(answer()).ended
    cases: list[tuple[dict[str, Any], str]] = [
        (answer() | {"model": "base"}, "here was asked, and base has answered"),
        (answer() | {"choices": []}, "no tokens and log-probabilities"),
        (answer(token_ids=None), "0 tokens with 3 log-probabilities"),
        (answer(token_ids=[], logprobs=[], finish_reason="stop"), "ended before its first token"),
        (answer(token_ids=[5, 6]), "2 tokens with 3 log-probabilities"),
        (answer(logprobs=[-0.5, None, -1.0]), "token 6 has the log-probability None"),
        (answer(logprobs=[-0.5, -0.25, math.nan]), "a number is float nan"),
        (answer(finish_reason="repetition"), "ended by 'repetition' after 3 of 3 tokens"),
        (answer(finish_reason="stop", token_ids=[5, 6, 7]), "ended by token 7, which ends nothing"),
    ]
    for case, said in cases:
        with pytest.raises(ServerError, match=said):
            drafted(case)
    # Cut short of the limit.
    with pytest.raises(ServerError, match="ended by 'length' after 3 of 9 tokens"):
        drafted(answer(), 9)


def read(*lines: str) -> list[dict[str, Any]]:
    """Parts of a stream of these lines."""

    async def every() -> list[dict[str, Any]]:
        async def of_server() -> AsyncIterator[str]:
            for line in lines:
                yield line

        found = []
        async for part in parts(of_server(), "here"):
            found.append(part)
        return found

    return asyncio.run(every())


def test_a_line_ends_in_a_line_feed_alone() -> None:
    """vLLM leaves U+2028 and U+0085 as they are in the text of an answer, cut anywhere."""
    text = 'data: {"text": "a\u2028b\u0085c"}\n\ndata: [DONE]\n\n'.encode()

    async def every(size: int) -> list[str]:
        async def pieces() -> AsyncIterator[bytes]:
            for begin in range(0, len(text), size):
                yield text[begin : begin + size]

        found = []
        async for line in lines_of(pieces()):
            found.append(line)
        return found

    for size in (1, 7, 1000):
        lines = asyncio.run(every(size))
        assert lines == ['data: {"text": "a\u2028b\u0085c"}', "", "data: [DONE]", "", ""]
        assert read(*lines) == [{"text": "a\u2028b\u0085c"}]


def test_parts_of_a_stream() -> None:
    assert read('data: {"a": 1}', "", 'data: {"b": 2}', "", "data: [DONE]", "") == [
        {"a": 1}, {"b": 2},
    ]  # fmt: skip
    dead = '{"error": {"message": "EngineCore encountered an issue", "type": "x", "code": 500}}'
    with pytest.raises(ServerUnreachable, match="here: EngineCore encountered an issue"):
        read(f"data: {dead}")
    with pytest.raises(RequestRefused, match="here: HTTP 400: too long"):
        read('data: {"error": {"message": "too long", "type": "x", "code": 400}}')
    for line in ("<html>: a page", "data: {", "data: 7"):
        with pytest.raises(ServerError, match="here: the answer is no stream of JSON"):
            read(line)
