"""Sample from vLLM servers: token ids in, token ids and log-probabilities out, nothing tokenised
again.

A request asks one version of the adapter, by its id, and keeps it through all tries. It goes to the
server with the fewest requests. One that does not answer is left alone for a while, and what it was
asked goes to others; one that has forgotten the version (it was started again) gets it back under
the same id, and must prove it, before it is asked again.
"""

import asyncio
import math
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import httpx

from megalora.rl.episode import Sampled
from megalora.serve.answers import COMPLETION
from megalora.serve.api import is_local
from megalora.serve.errors import (
    AdapterNotFound,
    ServeError,
    ServerError,
    ServerUnreachable,
    refusal,
)

FIRST_REST_S = 1.0
LONGEST_REST_S = 30.0
"""Seconds that a server is left alone after a failure; twice as long after each further one."""
AS_TRAINED = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
"""Otherwise vLLM takes the base's generation_config.json, and samples from another distribution
than the one whose log-probabilities are trained on."""


class Versions(Protocol):
    """What there is to sample from; a ``Publisher`` is one."""

    def id_of(self, version: int) -> str:
        """Id of a version. Raises ``KeyError`` where it is dropped."""
        ...

    def restore(self, server: str) -> None:
        """Bring to a server what it lacks."""
        ...


class _Server:
    def __init__(self, url: str, answer_s: float, headers: dict[str, str]) -> None:
        self.url = url
        self.running = 0
        self.failures = 0
        self.rests_until = 0.0
        self.reason = ""
        self.restoring = asyncio.Lock()
        self.http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(answer_s, connect=10.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            headers=headers,
            verify=url.startswith("https:"),
            trust_env=not is_local(url),
        )


class Servers:
    """Several servers as one. Its async methods belong to one event loop; ``use`` and ``in_use``
    may be called from any thread."""

    def __init__(
        self,
        urls: Sequence[str],
        versions: Versions,
        *,
        max_new_tokens: int,
        stop: Collection[int] = (),
        concurrency: int = 64,
        patience_s: float = 600.0,
        answer_s: float = 1800.0,
        api_key: str | None = None,
    ) -> None:
        """
        Args:
            stop: tokens that end a completion.
            concurrency: requests that a server gets at the same time.
            patience_s: seconds for which no server may answer before the run ends.
            answer_s: seconds that one completion may take.
            api_key: None for $VLLM_API_KEY.
        """
        key = api_key or os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._servers = [_Server(url.rstrip("/"), answer_s, headers) for url in urls]
        self._versions = versions
        self._max_new_tokens = max_new_tokens
        self._stop = sorted(stop)
        self._concurrency = concurrency
        self._patience_s = patience_s
        self._version: int | None = None
        self._in_flight: Counter[int] = Counter()
        # Notified when a request has ended.
        self._freed = asyncio.Condition()
        self._under_way = 0
        self._answered_at = 0.0

    def use(self, version: int) -> None:
        """Requests that begin from now on ask this version, which is published."""
        self._version = version

    def in_use(self) -> set[int]:
        """Versions of requests under way, and the one that is asked next."""
        versions = {version for version, count in list(self._in_flight.items()) if count}
        if self._version is not None:
            versions.add(self._version)
        return versions

    async def sample(
        self, tokens: Sequence[int], stream: int = 0, temperature: float = 1.0
    ) -> Sampled:
        """What a server samples behind these tokens; it has no streams of draws.

        Raises:
            ServerUnreachable: no server has answered for ``patience_s``.
            ServerError: an answer is incomplete, or is that of another model.
            RequestRefused: such as a prompt that is too long for the model.
        """
        # Silence between two rounds is no failure.
        if not self._under_way:
            self._answered_at = time.monotonic()
        self._under_way += 1
        try:
            return await self._sample(tokens, temperature)
        finally:
            self._under_way -= 1

    async def _sample(self, tokens: Sequence[int], temperature: float) -> Sampled:
        version: int | None = None
        while True:
            server = await self._free_server()
            # Chosen when the request begins, not when it starts to wait for a place.
            version = self._begun(version)
            self._in_flight[version] += 1
            try:
                return await self._ask(server, version, tokens, temperature)
            except (ServerUnreachable, AdapterNotFound) as error:
                self._rest(server, error)
            finally:
                self._in_flight[version] -= 1
                server.running -= 1
                async with self._freed:
                    self._freed.notify_all()

    async def close(self) -> None:
        for server in self._servers:
            await server.http.aclose()

    def _begun(self, version: int | None) -> int:
        """The version that a request asks: its own, as long as there is one."""
        assert self._version is not None, "publish a version first"
        if version is not None:
            try:
                self._versions.id_of(version)
                return version
            except KeyError:
                pass
        return self._version

    async def _free_server(self) -> _Server:
        """The server with the fewest requests that has room and does not rest."""
        while True:
            now = time.monotonic()
            awake = [server for server in self._servers if server.rests_until <= now]
            free = [server for server in awake if server.running < self._concurrency]
            if free:
                chosen = min(free, key=lambda server: server.running)
                # Counted before anything is awaited, or all would choose the same.
                chosen.running += 1
                return chosen
            self._check_patience(now)
            # Until a request ends, or the next server has rested.
            wakes = min(server.rests_until for server in self._servers)
            wait_s = max(wakes - now, 0.01) if not awake else LONGEST_REST_S
            async with self._freed:
                try:
                    await asyncio.wait_for(self._freed.wait(), wait_s)
                except TimeoutError:
                    continue

    def _check_patience(self, now: float) -> None:
        # One that is merely busy has not failed.
        if all(server.failures for server in self._servers):
            silent_s = now - self._answered_at
            if silent_s > self._patience_s:
                reasons = "; ".join(server.reason for server in self._servers)
                raise ServerUnreachable(
                    f"no server has answered for {silent_s / 60:.1f} minutes: {reasons}"
                )

    def _rest(self, server: _Server, error: ServeError) -> None:
        """Leave a server alone that has failed."""
        server.failures += 1
        server.reason = str(error)
        rest_s = min(FIRST_REST_S * 2 ** (server.failures - 1), LONGEST_REST_S)
        server.rests_until = time.monotonic() + rest_s

    async def _ask(
        self, server: _Server, version: int, tokens: Sequence[int], temperature: float
    ) -> Sampled:
        ident = self._versions.id_of(version)
        body = COMPLETION | AS_TRAINED | {
            "model": ident, "prompt": [*tokens], "max_tokens": self._max_new_tokens,
            "temperature": temperature, "stop_token_ids": self._stop,
        }  # fmt: skip
        try:
            answer = await self._post(server, ident, body)
        except AdapterNotFound:
            # One request brings the versions back, the others wait for it.
            # In a thread: other requests go on meanwhile.
            async with server.restoring:
                await asyncio.to_thread(self._versions.restore, server.url)
            answer = await self._post(server, ident, body)
        # It is well again, and rests for the shortest time after its next failure.
        server.failures = 0
        self._answered_at = time.monotonic()
        where = f"{server.url}: {ident}"
        return sampled(answer, ident, version, self._max_new_tokens, self._stop, where)

    async def _post(self, server: _Server, ident: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one try; raises ``ServerUnreachable`` where another try may be answered."""
        doing = f"{server.url}: asking {ident}"
        try:
            response = await server.http.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ServerUnreachable(f"{doing}: no answer ({reason})") from error
        if response.status_code == 200:
            try:
                return response.json()
            except ValueError:
                raise ServerError(f"{doing}: the answer is no JSON; is it vLLM?") from None
        refused = refusal(doing, response.status_code, response.text)
        # Too many requests, or a server that is failing: another one, or later.
        if response.status_code == 429 or isinstance(refused, ServerError):
            raise ServerUnreachable(str(refused))
        raise refused


def sampled(
    answer: dict[str, Any], ident: str, version: int, max_new_tokens: int,
    stop: Collection[int], where: str,
) -> Sampled:  # fmt: skip
    """The completion in vLLM's answer; raises ``ServerError`` where it is not whole, or not that of
    the model which was asked."""
    try:
        (choice,) = answer["choices"]
        model = answer["model"]
        tokens = choice["token_ids"]
        logprobs = choice["logprobs"]["token_logprobs"]
        reason = choice["finish_reason"]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(
            f"{where}: the answer has no tokens and log-probabilities"
            f" ({type(error).__name__}: {error}); is this vLLM 0.32?"
        ) from None
    if model != ident:
        raise ServerError(f"{where} was asked, and {model} has answered")
    tokens = tokens or []
    if not tokens or len(tokens) != len(logprobs):
        raise ServerError(f"{where}: {len(tokens)} tokens with {len(logprobs)} log-probabilities")
    for token, logprob in zip(tokens, logprobs, strict=True):
        # vLLM writes null for what is not finite.
        if logprob is None or not math.isfinite(logprob):
            raise ServerError(f"{where}: token {token} has the log-probability {logprob}")
    # vLLM's other reasons, such as abort, are no ends of a completion.
    ended = reason == "stop"
    if not ended and (reason != "length" or len(tokens) != max_new_tokens):
        raise ServerError(
            f"{where}: ended by {reason!r} after {len(tokens)} of {max_new_tokens} tokens"
        )
    if ended and stop and tokens[-1] not in stop:
        raise ServerError(f"{where}: ended by token {tokens[-1]}, which ends nothing")
    return Sampled(tokens, logprobs, ended, [version] * len(tokens))
