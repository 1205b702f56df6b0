"""What samples completions, whether it is the run's own model or a server."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import torch.distributed as dist

from megalora.first_rank import on_first_rank
from megalora.rl.episode import Sampled
from megalora.train.signals import Stopped

MEET_S = 5.0
"""Seconds between two meetings of the ranks while the first one waits."""


class Engine(Protocol):
    """Samples for episodes that are played on the first rank."""

    def publish(self, version: int) -> None:
        """From now on, sample from the adapter as it is; collective over the world."""
        ...

    async def sample(self, tokens: Sequence[int], stream: int, temperature: float) -> Sampled:
        """What stands behind these tokens; on the first rank's event loop.

        Args:
            stream: number of the stream of draws, where the engine has such: the same for the same
                request of the same run.
        """
        ...

    def work_until(self, done: "Future[Any] | None") -> None:
        """Let episodes be played until ``done`` is; collective over the world.

        Args:
            done: of the first rank; None on the others.
        Raises:
            Stopped: the run was told to stop; what is played is abandoned.
        """
        ...

    def close(self) -> None:
        """End what runs beside the training."""
        ...


def result_of[T](engine: Engine, done: "Future[T] | None", failure: str) -> T:
    """What the first rank waits for, on every rank, while the engine works; collective.

    Args:
        done, failure: as in ``Engine.work_until`` and ``on_first_rank``.
    """
    engine.work_until(done)

    def result() -> T:
        assert done is not None, "the first rank has it"
        return done.result()

    return on_first_rank(result, failure)


def meet_until(done: "Future[Any] | None", stop: Callable[[], bool] = lambda: False) -> None:
    """Wait until ``done`` is, the first rank's; collective. Ranks meet meanwhile, so that no time
    limit of a collective counts how long it takes.

    Raises:
        Stopped: ``stop``, which is collective, has said so.
    """
    while True:
        over = [False]
        if done is not None:
            wait([done], timeout=MEET_S)
            over[0] = done.done()
        dist.broadcast_object_list(over, src=0)
        if over[0]:
            return
        if stop():
            raise Stopped
