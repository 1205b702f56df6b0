"""Sample from the model that is being trained: no server, and no adapter that could be stale.

Episodes are played on the first rank, in a thread of their own. What they ask comes here as
requests; those that wait at the same time are generated together, on all ranks.
"""

import asyncio
import queue
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megalora.config import RunConfig
from megalora.generate.generate import generate
from megalora.generate.options import Sampling, stop_tokens
from megalora.hf.folder import local_folder
from megalora.lora.adapted_model import AdaptedModel
from megalora.rl.episode import Sampled
from megalora.train.signals import Stopped

QUIET_S = 0.01
"""Requests are generated when none has come for so long: episodes begin within it, and one that
waits for a tool holds up none of the others."""
POLL_S = 0.05
PASSES_BETWEEN = 16
"""Passes after which ranks meet likewise: about a second of a large model."""
MEET_S = 5.0
"""Seconds without a request after which ranks meet, to hear whether the run is to stop."""


@dataclass(frozen=True, eq=False)
class _Request:
    tokens: Sequence[int]
    stream: int
    temperature: float
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[Sampled]"

    def resolve(self, sampled: Sampled) -> None:
        """From another thread than the event loop's."""
        self.loop.call_soon_threadsafe(self._set, sampled)

    def _set(self, sampled: Sampled) -> None:
        # An episode that was cancelled meanwhile waits no more.
        if not self.answer.done():
            self.answer.set_result(sampled)


class Embedded:
    """Generates what the episodes of the first rank ask for."""

    def __init__(
        self,
        model: AdaptedModel,
        options: Sampling,
        stop: Collection[int],
        max_sequences: int,
        *,
        routes: bool = False,
        told: Callable[[], bool] | None = None,
    ) -> None:
        """
        Args:
            options: its seed is the run's; each request has a stream of draws of its own.
            stop: tokens that end an answer.
            max_sequences, routes: see ``generate``.
            told: says whether the run was told to stop; collective.
        """
        self.model = model
        self.options = options
        self.stop = frozenset(stop)
        self.max_sequences = max_sequences
        self.routes = routes
        self.told = told
        self.version = 0
        self._passes = 0
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()

    def publish(self, version: int) -> None:
        """As the protocol says: the model samples from what it is anyway."""
        self.version = version

    async def sample(self, tokens: Sequence[int], stream: int, temperature: float) -> Sampled:
        """As the protocol says."""
        loop = asyncio.get_running_loop()
        request = _Request(tokens, stream, temperature, loop, loop.create_future())
        self._requests.put(request)
        return await request.answer

    def work_until(self, done: "Future[Any] | None") -> None:
        """As the protocol says: generate for all requests until ``done`` is."""
        while True:
            waiting = self._gather(done) if done is not None else []
            over = done is not None and not waiting and done.done()
            asked: list[Any] = [(_message(waiting), over)]
            # Every rank takes part in every pass, and the first one alone knows the requests.
            dist.broadcast_object_list(asked, src=0)
            (prompts, streams, temperature), over = asked[0]
            if over:
                return
            self._leave_if_told()
            if not prompts:
                continue
            options = replace(self.options, temperature=temperature)
            answers = generate(
                self.model, prompts, options, stop=self.stop, numbers=streams,
                max_sequences=self.max_sequences, routes=self.routes, tempered=True,
                between=self._pass,
            )  # fmt: skip
            for request, answer in zip(waiting, answers, strict=False):
                versions = [self.version] * len(answer.tokens)
                sampled = Sampled(
                    answer.tokens, answer.logprobs, answer.ended, versions, answer.routes
                )
                request.resolve(sampled)

    def _leave_if_told(self) -> None:
        """Raise ``Stopped`` where the run was told to stop; collective."""
        if self.told is not None and self.told():
            raise Stopped

    def _pass(self) -> None:
        # Ranks make the same passes, so that they meet at the same one.
        self._passes += 1
        if self._passes % PASSES_BETWEEN == 0:
            self._leave_if_told()

    def close(self) -> None:
        """As the protocol says: nothing does."""

    def _gather(self, done: "Future[Any]") -> list[_Request]:
        """The next requests; none when ``done`` is, or when none has come for ``MEET_S``."""
        waiting: list[_Request] = []
        began = time.monotonic()
        last = began
        while True:
            try:
                # While episodes still arrive, a short wait each; else until one does.
                waiting.append(self._requests.get(timeout=QUIET_S if waiting else POLL_S))
                last = time.monotonic()
            except queue.Empty:
                if waiting and time.monotonic() - last >= QUIET_S:
                    return _of_one_temperature(waiting, self._requests)
                is_late = time.monotonic() - began > MEET_S
                if not waiting and (done.done() or is_late):
                    return []


def _of_one_temperature(
    waiting: list[_Request], later: "queue.SimpleQueue[_Request]"
) -> list[_Request]:
    """Those that are sampled as the first one is, in one order whatever episodes came first; the
    others wait."""
    temperature = waiting[0].temperature
    now: list[_Request] = []
    for request in waiting:
        if request.temperature == temperature:
            now.append(request)
        else:
            later.put(request)
    return sorted(now, key=lambda request: request.stream)


def _message(requests: Sequence[_Request]) -> tuple[list[list[int]], list[int], float]:
    """What every rank must know of requests: tokens, streams and temperature."""
    tokens = [list(request.tokens) for request in requests]
    streams = [request.stream for request in requests]
    return tokens, streams, requests[0].temperature if requests else 1.0


def embedded_in(
    model: AdaptedModel, config: RunConfig, told: Callable[[], bool] | None = None
) -> Embedded:
    """The engine of a run's own model; ``told`` as for ``Embedded``."""
    options = Sampling(
        temperature=1.0, seed=config.train.seed, max_new_tokens=config.rl.max_new_tokens
    )
    stop = stop_tokens(local_folder(config.model.path))
    routes = config.rl.replays(bool(model.shape.moe_layers))
    return Embedded(model, options, stop, config.rl.concurrency, routes=routes, told=told)
