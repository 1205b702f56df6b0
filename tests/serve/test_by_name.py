"""Ask vLLM itself for an adapter by its plain name, in the wire format of OpenAI's client: all that
a request may hold passes through, streams stream, and a swap interrupts nobody."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from megalora.chat.remote import RemoteEngine
from megalora.serve.run import request_to_try
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from tests.serve.adapters import make_adapter, tokens_of
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.vllm
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
QUESTION = [{"role": "user", "content": "What is 6 times 7?"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": QUESTION, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": QUESTION, "max_tokens": 4, "n": 3, "temperature": 1.0, "seed": 5}),
    (CHAT, {"messages": QUESTION, "max_completion_tokens": 4, "stop": ["e"], "tools": [TOOL],
            "tool_choice": "none"}),
    # The server was started without a parser of tool calls, which vLLM says.
    (CHAT, {"messages": QUESTION, "tools": [TOOL], "tool_choice": "auto"}),
    (CHAT, {"messages": QUESTION, "temperature": "hot"}),
    (CHAT, {"messages": "not a list"}),
    (TEXT, {"prompt": tokens_of(0, 9), "max_tokens": 6, "logprobs": 1, "echo": True}),
    (TEXT, {"prompt": ["one", "two"], "max_tokens": 3, "user": "somebody", "unknown": {"a": 1}}),
    # Five megabytes, more than the model's context: vLLM's own words.
    (TEXT, {"prompt": "many words " * 500_000, "max_tokens": 3}),
    ("/tokenize", {"messages": QUESTION}),
]  # fmt: skip


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S, trust_env=False) as http:
        yield http


@pytest.fixture
def versions(tiny: Path, tmp_path: Path) -> list[Path]:
    """Two adapters that say different things."""
    return [make_adapter(tmp_path / str(seed), tiny, 40 + seed) for seed in range(2)]


def content_of(response: httpx.Response) -> tuple[int, Any]:
    """Status and body without what differs between two equal requests."""
    # The second finds its prompt in vLLM's cache, which changes the last digits.
    body = json.loads(response.text, parse_float=lambda digits: round(float(digits), 3))
    for key in ("id", "created"):
        body.pop(key, None)
    return response.status_code, body


def chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream, as OpenAI's client reads them."""
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data and data != "[DONE]":
            yield json.loads(data)


def test_a_name_is_an_id_for_every_request(
    client: Client, http: httpx.Client, versions: list[Path], server: Server
) -> None:
    model = client.load("math", versions[0])
    statuses = set()
    for route, body in BODIES:
        # Greedily, unless a body says otherwise: at random no two answers would be equal.
        body = {"temperature": 0.0} | body
        by_name = content_of(http.post(route, json=body | {"model": "math"}))
        assert by_name == content_of(http.post(route, json=body | {"model": model})), route
        status, answer = by_name
        statuses.add(status)
        if status == 200 and route != "/tokenize":
            # Which version it was; and the adapter answered, not the base.
            assert answer["model"] == model
            assert answer["usage"]["completion_tokens"] > 0
    assert statuses == {200, 400}
    base = http.post(CHAT, json=BODIES[0][1] | {"model": str(server.base)}).json()
    named = http.post(CHAT, json=BODIES[0][1] | {"model": "math"}).json()
    assert base["choices"][0]["logprobs"] != named["choices"][0]["logprobs"]

    broken = http.post(
        CHAT, content=b'{"model": "math", ', headers={"Content-Type": "application/json"}
    )
    assert broken.status_code == 400 and "json" in broken.text.lower()
    unknown = http.post(CHAT, json={"model": "maths", "messages": QUESTION})
    assert unknown.status_code == 404
    assert f"Valid aliases: {server.base}, math, {model}." in unknown.json()["error"]["message"]
    cards = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [str(server.base), "math", model]
    assert client.names() == {"math": model}
    for path in ("/health", "/version", "/metrics"):
        assert http.get(path).status_code == 200


def test_a_swap_during_a_stream(client: Client, http: httpx.Client, versions: list[Path]) -> None:
    old = client.load("math", versions[0])
    body = {
        "model": "math", "messages": QUESTION, "max_tokens": 60, "ignore_eos": True,
        "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    whole = http.post(CHAT, json=body | {"stream": False, "stream_options": None}).json()
    swapped = ""
    text = ""
    usage = None
    models = set()
    count = 0
    with http.stream("POST", CHAT, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for chunk in chunks(response):
            models.add(chunk["model"])
            count += 1
            # The stream is under way: were it held back, it would be over before the swap.
            if not swapped:
                swapped = client.swap("math", versions[1], drain_s=0.0)
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            usage = chunk.get("usage") or usage
    # The weights that it began with, to the end.
    assert models == {old} and text == whole["choices"][0]["message"]["content"]
    assert count > 10
    # A stream leaves out what is null.
    assert usage is not None and usage.items() <= whole["usage"].items()
    assert usage["completion_tokens"] == 60
    now = http.post(CHAT, json=body | {"stream": False, "stream_options": None}).json()
    assert now["model"] == swapped
    assert now["choices"][0]["message"]["content"] != text
    assert http.post(CHAT, json=body | {"model": old}).status_code == 404


def test_the_printed_command_works_as_typed(
    client: Client, server: Server, versions: list[Path]
) -> None:
    model = client.load("math", versions[0])
    for chat, kind in ((True, "chat.completion"), (False, "text_completion")):
        line = request_to_try(server.url, "math", chat=chat, key=False)
        # A proxy of the environment's would not find this machine.
        done = subprocess.run(
            f"no_proxy=* {line} --silent", shell=True, capture_output=True, text=True, check=True
        )
        answer = json.loads(done.stdout)
        assert (answer["model"], answer["object"]) == (model, kind)


def asked(engine: RemoteEngine) -> str:
    """The whole answer to one question."""
    options = {"temperature": 0.0, "max_new_tokens": 12}
    return "".join(engine.stream(QUESTION, options, by_base=False, number=0))


def test_the_next_question_of_a_chat_gets_the_new_version(
    client: Client, server: Server, versions: list[Path]
) -> None:
    first = client.load("math", versions[0])
    named = RemoteEngine(server.url, "math")
    pinned = RemoteEngine(server.url, first)
    before = asked(named)
    assert before == asked(pinned)
    # Beside the old one, which the whole id keeps asking.
    client.load("math", versions[1])
    after = asked(named)
    assert asked(pinned) == before != after
    client.unload(first)
    assert asked(named) == after
