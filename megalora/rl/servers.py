"""Sample from vLLM servers: token ids in, token ids and log-probabilities out, nothing tokenised
again.

A request asks one version of the adapter, by its id, and keeps it until it is answered or breaks
off: a server dies, is started again, or stays silent. What has come by then stays, with the version
that sampled it; the rest is asked of the newest version. A request goes to the server with the
fewest. One that does not answer is left alone for a while; one that has forgotten the version (it
was started again) gets it back under the same id, and must prove it, before it is asked again.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Protocol

import httpx

from megalora.rl.draft import Draft, failed, parts_of
from megalora.rl.episode import Sampled
from megalora.rl.reported_routes import ReportedRoutes
from megalora.serve.api import is_local
from megalora.serve.body import AS_SENT, pieces_of
from megalora.serve.errors import AdapterNotFound, ServeError, ServerUnreachable

FIRST_REST_S = 1.0
LONGEST_REST_S = 30.0
"""Seconds that a server is left alone after a failure; twice as long after each further one."""


class Versions(Protocol):
    """What there is to sample from; a ``Publisher`` is one."""

    def id_of(self, version: int) -> str:
        """Id of a version. Raises ``KeyError`` where it is dropped."""
        ...

    def restore(self, server: str) -> None:
        """Bring to a server what it lacks."""
        ...


class _Server:
    def __init__(self, url: str, silence_s: float, headers: dict[str, str]) -> None:
        self.url = url
        self.running = 0
        self.failures = 0
        self.rests_until = 0.0
        self.reason = ""
        self.restoring = asyncio.Lock()
        self.http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(silence_s, connect=10.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            headers={**AS_SENT, **headers},
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
        silence_s: float = 1800.0,
        api_key: str | None = None,
        reported: ReportedRoutes | None = None,
    ) -> None:
        """
        Args:
            stop: tokens that end a completion.
            concurrency: requests that a server gets at the same time.
            patience_s: seconds for which no server may answer before the run ends.
            silence_s: seconds for which a server may say nothing to a request before it counts as
                gone.
            api_key: None for $VLLM_API_KEY.
            reported: what servers say of the experts that they chose; None where it is not asked.
        """
        key = api_key or os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._servers = [_Server(url.rstrip("/"), silence_s, headers) for url in urls]
        self._versions = versions
        self._max_new_tokens = max_new_tokens
        self._stop = frozenset(stop)
        self._concurrency = concurrency
        self._patience_s = patience_s
        self._reported = reported
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
            draft = Draft(tokens, self._max_new_tokens, self._stop, temperature, self._reported)
            return await self._sample(draft)
        finally:
            self._under_way -= 1

    async def _sample(self, draft: Draft) -> Sampled:
        while True:
            server = await self._free_server()
            # Chosen when the request begins, not when it starts to wait for a place; and anew for
            # each further try: what is sampled then should be as fresh as it can be.
            version = self._version
            assert version is not None, "publish a version first"
            self._in_flight[version] += 1
            try:
                return await self._ask(server, version, draft)
            except (ServerUnreachable, AdapterNotFound) as error:
                self._rest(server, error)
                # All but the end of the answer had come; more would not be of this completion.
                if draft.is_whole:
                    return draft.finished()
            finally:
                self._in_flight[version] -= 1
                server.running -= 1
                async with self._freed:
                    self._freed.notify_all()

    async def close(self) -> None:
        for server in self._servers:
            await server.http.aclose()

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

    async def _ask(self, server: _Server, version: int, draft: Draft) -> Sampled:
        ident = self._versions.id_of(version)
        try:
            return await self._stream(server, ident, version, draft)
        except AdapterNotFound:
            # One request brings the versions back, the others wait for it.
            # In a thread: other requests go on meanwhile.
            async with server.restoring:
                await asyncio.to_thread(self._versions.restore, server.url)
            return await self._stream(server, ident, version, draft)

    async def _stream(self, server: _Server, ident: str, version: int, draft: Draft) -> Sampled:
        """One try; raises ``ServerUnreachable`` where another may be answered, and ``draft`` then
        has what has come."""
        doing = f"{server.url}: asking {ident}"
        where = f"{server.url}: {ident}"
        reason: str | None = None
        try:
            async with server.http.stream(
                "POST", "/v1/completions", json=draft.body(ident)
            ) as response:
                if response.status_code != 200:
                    pieces = [piece async for piece in pieces_of(response, doing)]
                    text = b"".join(pieces).decode(errors="replace")
                    raise failed(doing, response.status_code, text)
                async for part in parts_of(response, doing):
                    reason = draft.take(part, ident, version, where)
                    # It is well, and rests for the shortest time after its next failure.
                    server.failures = 0
                    self._answered_at = time.monotonic()
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise ServerUnreachable(f"{doing}: no answer ({said})") from error
        # A server that ends, or is told to pause, aborts: no end of a completion either.
        if reason in (None, "abort"):
            count = len(draft.tokens)
            raise ServerUnreachable(f"{doing}: the answer broke off after {count} tokens")
        return draft.sampled(reason, where)
