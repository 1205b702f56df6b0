"""Answer by a running server: OpenAI's chat completions, streamed as server-sent events."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from megalora.chat.session import Message
from megalora.json_text import parse_json
from megalora.serve.body import AS_SENT, read_body, read_lines
from megalora.serve.errors import ServerError, ServerUnreachable, refusal
from megalora.serve.vllm import Client
from megalora.wording import printable

_FIELDS = {"max_new_tokens": "max_tokens"}
"""Names that differ from those of ``Sampling``."""


class RemoteEngine:
    """A model of a server, and the base that the server lists beside it.

    Every question goes to the version that the name means then: one that is swapped in answers the
    next question. A whole id, NAME@VERSION, stays with its version.
    """

    def __init__(self, url: str, name: str, *, timeout_s: float = 300.0) -> None:
        """
        Args:
            url: such as ``http://127.0.0.1:8000``; OpenAI's ``/v1`` at its end is taken off.
            name: of an adapter or of the base, as the server lists it, or a whole id.
            timeout_s: longest wait for a piece of an answer.

        Raises:
            ServerUnreachable, ServerError: no server answers there, or none of this kind.
            AdapterNotFound: it serves nothing of this name.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self.name = name
        key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
        self._client = Client(self.url, timeout=timeout_s, api_key=key)
        # Raises for a name that is not served.
        model = self._client.resolve(name)
        bases = [served.id for served in self._client.list() if served.is_base]
        self.base = bases[0] if bases else None
        self.has_adapter = model not in bases
        # Connecting is quick or hopeless; a piece of an answer may wait behind other requests.
        headers = dict(AS_SENT)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._http = httpx.Client(timeout=httpx.Timeout(timeout_s, connect=10.0), headers=headers)

    @property
    def has_base(self) -> bool:
        return self.base is not None

    def stream(
        self, messages: Sequence[Message], options: Mapping[str, Any], *, by_base: bool, number: int
    ) -> Iterator[str]:
        """As the protocol says; the server has the defaults of what is not set."""
        fields: dict[str, Any] = {}
        for name, value in options.items():
            fields[_FIELDS.get(name, name)] = value
        # As with draws of our own: the next answer has others.
        if "seed" in fields:
            fields["seed"] += number
        model = self.base if by_base and self.has_adapter else self._model_now()
        body = {"model": model, "messages": list(messages), "stream": True, **fields}
        doing = f"asking {model}"
        try:
            with self._http.stream(
                "POST", f"{self.url}/v1/chat/completions", json=body
            ) as response:
                # A refusal comes as one JSON object, not as events.
                if response.status_code != 200:
                    text = read_body(response, doing).decode(errors="replace")
                    raise refusal(doing, response.status_code, text)
                yield from pieces(read_lines(response, doing))
        except httpx.HTTPError as error:
            raise ServerUnreachable(f"{doing}: {self.url} does not answer ({error})") from error

    def _model_now(self) -> str:
        """What a request gives as its model: the name itself where the server takes it, and looks
        it up when it begins to answer; else the id of the newest version."""
        if self.name in self._client.names():
            return self.name
        # A server without our plug-in knows whole ids alone.
        return self._client.resolve(self.name)


def pieces(lines: Iterator[str]) -> Iterator[str]:
    """Text of the answer from the lines of a stream of events.

    Raises:
        ServerError: the stream reports an error, is not one of chat completions, or ends early.
    """
    for line in lines:
        # Empty lines end events, and lines that begin with a colon are comments to keep the
        # connection alive.
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = parse_json(data)
            if "error" in event:
                said = " ".join(printable(str(event["error"].get("message", data))).split())
                raise ServerError(f"the server failed: {said[:500]}")
            # The last event may have counts in place of choices.
            for choice in event["choices"]:
                text = choice["delta"].get("content")
                if text is not None and not isinstance(text, str):
                    raise TypeError
                if text:
                    yield text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(f"not an event of chat completions: {data[:100]!r}") from error
    raise ServerError("the server closed the connection before the answer ended")
