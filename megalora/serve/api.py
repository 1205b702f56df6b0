"""Call vLLM's HTTP routes, one method each, and raise its refusals as typed errors."""

import logging
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from megalora.json_text import NotJson, parse_json
from megalora.serve.body import AS_SENT, read_body
from megalora.serve.errors import (
    RequestRefused,
    RuntimeUpdatesOff,
    ServerError,
    ServerUnreachable,
    refusal,
)
from megalora.wording import printable, typed

IDLE_CONNECTION_S = 2.0
"""vLLM closes idle connections after 5 s; a request sent at that moment would be lost."""
MODELS = "/v1/models"
"""The route that every server of this API has."""
# Otherwise httpx logs a line for every request, once somebody turns INFO on.
logging.getLogger("httpx").setLevel(logging.WARNING)
_LOCAL = ("127.0.0.1", "localhost", "::1")


def is_local(url: str) -> bool:
    """Whether a URL is of this machine, which a proxy cannot reach."""
    return urlsplit(url).hostname in _LOCAL


@dataclass(frozen=True)
class Served:
    """One model id of the server."""

    id: str
    """Name in requests: NAME@VERSION, or a base model's name."""
    name: str
    version: str | None
    """Version of an adapter; None for base models and for adapters that something else loaded under
    a plain name."""
    path: str
    """Folder, as the server knows it."""
    is_base: bool


class Api:
    """A connection to one server; safe to share between threads.

    Every method raises ``ServerUnreachable``, or what ``errors.refusal`` makes of the answer.
    """

    def __init__(self, url: str, *, timeout: float, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        headers = dict(AS_SENT)
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = httpx.Client(
            base_url=self.url,
            # An answer may take long; a server that is there accepts the connection at once.
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_CONNECTION_S),
            headers=headers,
            # Reading the system's certificates takes a tenth of a second.
            verify=self.url.startswith("https:"),
            # A proxy from the environment cannot reach this machine's loopback.
            trust_env=not is_local(self.url),
        )

    def close(self) -> None:
        self._http.close()

    def health(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            # Closed unread: the status says it.
            with self._http.stream("GET", "/health") as response:
                return response.status_code == 200
        except httpx.HTTPError:
            return False

    def models(self) -> list[Served]:
        """Base models, then adapters in the order they were loaded."""
        return self._listed()[0]

    def names(self) -> dict[str, str]:
        """Plain names that the server itself takes in requests, and the id that each means now;
        none where its vLLM lacks our plug-in."""
        return self._listed()[1]

    def _listed(self) -> tuple[list[Served], dict[str, str]]:
        """Models, and ids by the plain names beside them."""
        body = self._call("listing models", MODELS, again=True)
        try:
            return _sorted(parse_json(body)["data"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServerError(
                f"{self.url} answers, but not as vLLM does ({type(error).__name__}); is it another"
                " server?"
            ) from error

    def load_adapter(self, model: str, path: str) -> str:
        """The server's words for what it has loaded."""
        body = {"lora_name": model, "lora_path": path}
        answer = self._call(f"loading {model}", "/v1/load_lora_adapter", body, loading=True)
        return answer.decode(errors="replace")

    def unload_adapter(self, model: str) -> None:
        body = {"lora_name": model}
        self._call(f"unloading {model}", "/v1/unload_lora_adapter", body)

    def completion(self, model: str, fields: dict[str, Any]) -> dict[str, Any]:
        """vLLM's answer to ``/v1/completions``."""
        body = fields | {"model": model}
        return self._asked(model, "completions", "/v1/completions", body)

    def scores(self, model: str, tokens: list[int]) -> dict[str, Any]:
        """vLLM's answer to ``/classify`` for one text: scores as the head gives them."""
        body = {"model": model, "input": [tokens], "use_activation": False}
        return self._asked(model, "scores", "/classify", body)

    def _asked(self, model: str, what: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of a route that vLLM has for one kind of model alone."""
        try:
            answer = parse_json(self._call(f"asking {model}", path, body, again=True))
        except NotJson as error:
            raise ServerError(
                f"asking {model}: {self.url} answers, but not as vLLM: {error}"
            ) from None
        except RuntimeUpdatesOff:
            raise RequestRefused(
                f"asking {model}: the server at {self.url} gives no {what}. Classifiers need a"
                " server of their own, as megalora serve starts it for them"
            ) from None
        if not isinstance(answer, dict):
            raise ServerError(f"asking {model}: {self.url} answers {typed(answer)}; is it vLLM?")
        return answer

    def _call(
        self,
        doing: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        loading: bool = False,
        again: bool = False,
    ) -> bytes:
        """The body of the answer to a request.

        Args:
            doing: what the request does, as error messages begin.
            path: the route.
            body: JSON to post; None to get.
            loading: the request loads an adapter, see ``errors.refusal``.
            again: asking twice does no harm, so that a request may be repeated after the server has
                closed the connection under it.
        """
        try:
            status, answer = self._sent(doing, path, body)
        except httpx.RemoteProtocolError as error:
            # Once: the second time, the connection is a new one.
            if again:
                return self._call(doing, path, body, loading=loading)
            raise ServerUnreachable(
                f"{doing}: {self.url} closed the connection ({error}); see the server's log"
            ) from error
        except httpx.TimeoutException as error:
            raise ServerUnreachable(
                f"{doing}: no answer from {self.url} in time; raise timeout, or see its log"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerUnreachable(
                f"{doing}: {self.url} does not answer ({error}); is the server running?"
            ) from error
        if status == 404 and path == MODELS:
            raise RequestRefused(f"{self.url} has no {path}; is it another server than vLLM's?")
        if status != 200:
            raise refusal(doing, status, answer.decode(errors="replace"), loading=loading)
        return answer

    def _sent(self, doing: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        """Status and body of the answer to a request."""
        method = "GET" if body is None else "POST"
        with self._http.stream(method, path, json=body) as response:
            return response.status_code, read_body(response, doing, self.timeout)


def _sorted(cards: list[dict[str, Any]]) -> tuple[list[Served], dict[str, str]]:
    """Models, and ids by the plain names beside them, of ``/v1/models``."""
    parents = {card["id"]: card.get("parent") for card in cards}
    models = []
    names = {}
    for card in cards:
        # An adapter's parent is a base, which has none. A plain name's is the version it means.
        parent = card.get("parent")
        if parent is not None and parents.get(parent) is not None:
            names[card["id"]] = parent
        else:
            models.append(_served(card))
    return models, names


def _served(card: dict[str, Any]) -> Served:
    """A model of ``/v1/models``."""
    # Names are printed, and are part of paths: none has a control character.
    for key in ("id", "root", "parent"):
        value = card.get(key)
        if value is not None and (not isinstance(value, str) or printable(value) != value):
            raise ValueError(f"{key} {value!r}")
    name, at, version = card["id"].rpartition("@")
    # Adapters name the model that they belong to. A base model's id may have an @ as well.
    is_base = card.get("parent") is None
    if is_base or not at:
        name = card["id"]
        version = None
    return Served(card["id"], name, version, card.get("root") or "", is_base)


def base_of(models: list[Served]) -> Served | None:
    """The server's base model; None if it lists none."""
    for served in models:
        if served.is_base:
            return served
    return None


def versions_among(models: list[Served], name: str) -> list[str]:
    """Ids of an adapter's versions, the oldest first."""
    return [served.id for served in models if served.name == name and not served.is_base]
