"""Answers that no vLLM gives: without end, without pause, compressed, of other shapes, with what a
terminal obeys."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from megalora.chat.remote import pieces
from megalora.rl.draft import Draft, parts, parts_of
from megalora.serve import body
from megalora.serve.answers import completion, prefix_logprobs, prompt_logprobs, scores
from megalora.serve.api import Api, Served
from megalora.serve.errors import ServeError, ServerError, ServerUnreachable, refusal
from megalora.wording import printable
from tests.hostile.one_line import refused

SERVED = Served("a@v", "a", "v", "/a", is_base=False)


def _api(answer: Callable[[httpx.Request], httpx.Response]) -> Api:
    api = Api("http://127.0.0.1:1", timeout=0.2, api_key=None)
    api._http = httpx.Client(
        base_url=api.url, headers=api._http.headers, transport=httpx.MockTransport(answer)
    )
    return api


def _endless() -> Iterator[bytes]:
    while True:
        yield b" " * 2**12


def _slow() -> Iterator[bytes]:
    while True:
        time.sleep(0.02)
        yield b" "


def test_a_body_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "LARGEST_BODY", 2**16)
    api = _api(lambda request: httpx.Response(200, content=_endless()))
    assert "the answer has more than" in refused(api.models, ServerError)
    # In an error's body too.
    api = _api(lambda request: httpx.Response(500, content=_endless()))
    assert "the answer has more than" in refused(api.models, ServerError)


def test_a_byte_now_and_then() -> None:
    api = _api(lambda request: httpx.Response(200, content=_slow()))
    assert "has not ended after 0.2 s" in refused(api.models, ServerUnreachable)


def test_nothing_is_inflated() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["accept-encoding"])
        content = gzip.compress(b" " * 10**6)
        return httpx.Response(200, headers={"content-encoding": "gzip"}, content=iter([content]))

    assert "the answer is compressed" in refused(_api(answer).models, ServerError)
    assert asked == ["identity"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused(status: int) -> None:
    """The key and the prompts go to the server that the user has named, and to no other one."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        content = b'{"data": []}' if len(asked) > 1 else b""
        where = {"location": f"http://elsewhere.example{request.url.path}"}
        status_now = 200 if content else status
        return httpx.Response(status_now, headers=where, content=iter([content]))

    for ask in (Api.models, lambda api: api.completion("a", {})):
        asked.clear()
        api = Api("http://127.0.0.1:1", timeout=0.2, api_key="a secret")
        # The client that it has made, without a network.
        api._http._transport = httpx.MockTransport(answer)
        assert str(status) in refused(lambda api=api, ask=ask: ask(api), ServeError)
        assert asked == ["127.0.0.1"]


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b"\xfe", b"", b"null", b"[1]", b'{"data": 3}', b'{"data": [{"id": 3}]}',
     b'{"data": [{"id": "a\\u001b[2J"}]}', b'{"data": [{"id": "a"}, {"id": []}]}',
     b'{"data": [NaN]}'],
)  # fmt: skip
def test_answers_of_other_shapes(content: bytes) -> None:
    api = _api(lambda request: httpx.Response(200, content=iter([content])))
    refused(api.models, ServerError)
    if not content.startswith(b'{"data"'):
        refused(lambda: api.completion("a", {}), ServerError)


@pytest.mark.parametrize(
    "change",
    [{"choices": 1e308}, {"choices": []}, {"choices": [{}]}, {"choices": [None]}, {"model": 3},
     {"choices": [{"token_ids": "ab", "logprobs": {"token_logprobs": [1]}}]},
     {"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": ["x"]}}]},
     {"choices": [{"index": 0, "logprobs": {"top_logprobs": [3]}}]},
     {"choices": [{"prompt_logprobs": [None, {"2": {"logprob": "x"}}]}]}, {"data": [3]},
     {"data": [{"probs": ["x"]}]}],
)  # fmt: skip
def test_completions_of_other_shapes(change: dict[str, Any]) -> None:
    refused(lambda: completion(SERVED, change), ServerError)
    refused(lambda: prompt_logprobs(change, [1, 2]), ServerError)
    refused(lambda: prefix_logprobs(change, [1, 2], 0), ServerError)
    refused(lambda: scores(change), ServerError)
    draft = Draft([1], 4, [])
    refused(lambda: draft.take(change, "a", 1, "here"), ServerError)


async def _sent(*lines: str) -> AsyncIterator[str]:
    for line in lines:
        yield line


@pytest.mark.parametrize(
    "line", ['data: {"error": 3}', 'data: {"error": {"code": []}}', "data: [", "data: 3", "x: {}"]
)
def test_parts_of_other_shapes(line: str) -> None:
    async def read() -> list[Any]:
        return [part async for part in parts(_sent(line), "asking a")]

    refused(lambda: asyncio.run(read()), ServeError)


def test_more_tokens_than_were_asked_for() -> None:
    choice = {"token_ids": [1] * 5, "logprobs": {"token_logprobs": [-1.0] * 5}}
    part = {"model": "a", "choices": [{**choice, "finish_reason": None}]}
    draft = Draft([1], 4, [])
    assert "more than the 4 tokens" in refused(lambda: draft.take(part, "a", 1, "here"))


def test_a_stream_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "LARGEST_BODY", 2**16)

    async def endless() -> AsyncIterator[bytes]:
        for piece in _endless():
            yield piece

    async def read() -> list[Any]:
        response = httpx.Response(200, content=endless())
        return [part async for part in parts_of(response, "asking a")]

    assert "the answer has more than" in refused(lambda: asyncio.run(read()), ServerError)
    response = httpx.Response(200, content=_endless())
    assert "the answer has more than" in refused(
        lambda: [*body.read_lines(response, "asking a")], ServerError
    )


FAKE = "\x1b[2J\x1b[31mFAKE\x1b]0;title\x07\r\nline\x9b1m\x08"


def test_nothing_a_server_says_is_obeyed_by_a_terminal() -> None:
    for text in (json.dumps({"error": {"message": FAKE, "type": "x"}}), FAKE,
                 json.dumps({"detail": FAKE})):  # fmt: skip
        error = refusal("asking a", 400, text)
        assert printable(str(error)) == str(error) and "FAKE line" in str(error)
    said = json.dumps({"error": {"message": FAKE}})
    assert "FAKE line" in refused(lambda: [*pieces(iter([f"data: {said}"]))], ServerError)
    assert printable(FAKE + "\tb") == "FAKE\nline1m\tb"
    with_list = {"choices": [{"delta": {"content": ["x"]}}]}
    refused(lambda: [*pieces(iter([f"data: {json.dumps(with_list)}"]))], ServerError)
