"""Answer by a running server: OpenAI's chat completions, streamed as server-sent events."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from megalora.chat.session import Message
from megalora.serve.api import Api
from megalora.serve.errors import ServerError, ServerUnreachable, refusal

_FIELDS = {"max_new_tokens": "max_tokens"}
"""Names that differ from those of ``Sampling``."""


class RemoteEngine:
    """A model of a server, and the base that the server lists beside it."""

    def __init__(self, url: str, name: str, *, timeout_s: float = 300.0) -> None:
        """
        Args:
            url: such as ``http://127.0.0.1:8000``; OpenAI's ``/v1`` at its end is taken off.
            name: of an adapter or of the base, as the server lists it.
            timeout_s: longest wait for a piece of an answer.

        Raises:
            ServerUnreachable, ServerError: no server answers there, or none of this kind.
            ValueError: it serves nothing of this name.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
        api = Api(self.url, timeout=timeout_s, api_key=key)
        models = api.models()
        api.close()
        # In the order of loading: the last one of a name is its newest version.
        found = [served for served in models if name in (served.name, served.id)]
        if not found:
            ids = ", ".join(served.id for served in models)
            raise ValueError(f"{self.url} serves no {name!r}; it serves {ids or 'nothing'}")
        bases = [served.id for served in models if served.is_base]
        self.model = found[-1].id
        self.base = bases[0] if bases else None
        self.has_adapter = not found[-1].is_base
        # Connecting is quick or hopeless; a piece of an answer may wait behind other requests.
        headers = {"Authorization": f"Bearer {key}"} if key else {}
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
        model = self.model
        if by_base and self.has_adapter:
            model = self.base
        body = {"model": model, "messages": list(messages), "stream": True, **fields}
        doing = f"asking {model}"
        try:
            with self._http.stream(
                "POST", f"{self.url}/v1/chat/completions", json=body
            ) as response:
                # A refusal comes as one JSON object, not as events.
                if response.status_code != 200:
                    text = response.read().decode(errors="replace")
                    raise refusal(doing, response.status_code, text)
                yield from pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise ServerUnreachable(f"{doing}: {self.url} does not answer ({error})") from error


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
            event = json.loads(data)
            if "error" in event:
                raise ServerError(f"the server failed: {event['error'].get('message', data)}")
            # The last event may have counts in place of choices.
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    yield text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(f"not an event of chat completions: {data[:100]!r}") from error
    raise ServerError("the server closed the connection before the answer ended")
