"""Answers of a server that speaks OpenAI's chat completions as vLLM does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megalora.chat.remote import RemoteEngine, pieces
from megalora.serve.errors import AdapterNotFound, RequestRefused, ServerError, ServerUnreachable

MODELS = [
    ("the-base", None), ("sums@1a", "the-base"), ("other@2b", "the-base"), ("sums@3c", "the-base"),
]  # fmt: skip
NAMES = [("sums", "sums@3c"), ("other", "other@2b")]
"""What our plug-in lists beside them."""


class Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        cards = [{"id": name, "parent": parent, "root": ""} for name, parent in self.server.models]
        self._send(200, json.dumps({"data": cards}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        self._send(*self.server.answer)

    def _send(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[Any]:
    made: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.asked = []
    made.models = [*MODELS[:1], *NAMES, *MODELS[1:]]
    made.answer = (200, events("Hi", " there"))
    made.url = f"http://127.0.0.1:{made.server_address[1]}"
    # Looked at often: at the end it is asked to stop, and waited for.
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def event(**delta: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"


def events(*texts: str) -> str:
    """What vLLM sends: the role, pieces, an empty last piece, counts, and the end."""
    lines = [event(role="assistant", content=""), ": still there\n\n"]
    lines += [event(content=text) for text in texts]
    lines += [event(content=None), 'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n']
    return "".join(lines) + "data: [DONE]\n\n"


def answer(engine: RemoteEngine, by_base: bool = False, number: int = 0, **options: Any) -> str:
    messages = [{"role": "user", "content": "Hello"}]
    return "".join(engine.stream(messages, options, by_base=by_base, number=number))


def test_the_name_and_the_base_are_asked(server: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    engine = RemoteEngine(f"{server.url}/v1/", "sums")
    assert engine.has_adapter
    assert engine.has_base
    assert answer(engine, temperature=0.5, max_new_tokens=9, seed=4, number=2) == "Hi there"
    assert answer(engine, by_base=True) == "Hi there"
    (path, first, key), (_, second, _) = server.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    # What was not set is left to the server; each answer has a seed of its own.
    assert first == {
        "model": "sums", "messages": [{"role": "user", "content": "Hello"}], "stream": True,
        "temperature": 0.5, "max_tokens": 9, "seed": 6,
    }  # fmt: skip
    assert second["model"] == "the-base"


def asked_models(server: Any) -> list[str]:
    return [body["model"] for _, body, _ in server.asked]


def test_a_version_of_its_own_stays(server: Any) -> None:
    """NAME is left to the server, which knows what it means when it answers; an id is not."""
    pinned = RemoteEngine(server.url, "sums@1a")
    named = RemoteEngine(server.url, "sums")
    answer(pinned)
    answer(named)
    # A swap.
    server.models = [("the-base", None), ("sums", "sums@4d"), *MODELS[1:], ("sums@4d", "the-base")]
    answer(pinned)
    answer(named)
    assert asked_models(server) == ["sums@1a", "sums", "sums@1a", "sums"]


def test_the_newest_version_where_the_server_knows_no_names(server: Any) -> None:
    server.models = MODELS
    engine = RemoteEngine(server.url, "sums")
    answer(engine)
    # A swap: the old version is gone.
    server.models = [*MODELS[:1], MODELS[2], ("sums@4d", "the-base")]
    answer(engine)
    assert asked_models(server) == ["sums@3c", "sums@4d"]
    server.models = MODELS[:1]
    with pytest.raises(AdapterNotFound, match="serves no 'sums'; it serves the-base"):
        answer(engine)


def test_a_base_alone_and_names_that_are_not_served(server: Any) -> None:
    assert not RemoteEngine(server.url, "the-base").has_adapter
    with pytest.raises(ValueError, match=r"serves no 'sms'; it serves the-base, sums@1a, other@2b"):
        RemoteEngine(server.url, "sms")
    with pytest.raises(ServerUnreachable, match="does not answer"):
        RemoteEngine("http://127.0.0.1:1", "sums")


def test_a_refusal_says_what_the_server_said(server: Any) -> None:
    server.answer = (400, json.dumps({"error": {"message": "too many tokens", "type": "x"}}))
    with pytest.raises(RequestRefused, match="asking sums: HTTP 400: too many tokens"):
        answer(RemoteEngine(server.url, "sums"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (event(content="Hi"), "closed the connection before the answer ended"),
        ("data: <html>\n\n", "not an event of chat completions: '<html>'"),
        ('data: {"id": 1}\n\n', "not an event of chat completions"),
        ('data: {"error": {"message": "out of memory"}}\n\n', "the server failed: out of memory"),
    ],
)
def test_streams_that_break_are_errors(text: str, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        list(pieces(iter(text.splitlines())))
