"""Time a call on every rank at once; the slowest rank's time counts.

On a GPU a sample is: the device spins while the host queues what follows, the L2 cache is emptied,
then two events around a few calls in a row, so that what an event costs is shared. The calls go
round copies of their operands, so that none finds its own in the cache. On a CPU it is the host's
clock around a few calls.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalora import host

type Call = Callable[[], object]

FLUSH_BYTES = 256 * 2**20
"""Five times the L2 of an H100 (50 MB), twice that of a B200 (126 MB)."""
MOST_COPIES = 8
HOST_CYCLES_PER_CALL = 400_000
"""200 us at 2 GHz: several times what the host needs to queue a collective or a backward pass."""


def slowest(value: float) -> float:
    """The largest of all ranks' values, the same on all; every rank must ask. Also a barrier."""
    found = torch.tensor([value], dtype=torch.float64, device=host.device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def copies(num_bytes: int, on_gpu: bool) -> int:
    """Sets of operands of ``num_bytes`` that calls in a row should go round, so that each call
    reads memory and not the cache."""
    if not on_gpu:
        return 1
    # Together they should exceed the cache, so the division rounds up.
    return min(MOST_COPIES, -(-FLUSH_BYTES // max(num_bytes, 1)))


@dataclass(frozen=True)
class Effort:
    """How long to look at one size."""

    row_seconds: float
    """Time that the calls of one sample should take; at most ``most_in_a_row`` calls."""
    total_seconds: float
    """Time that all samples of a size should take; ``min_samples`` to ``max_samples`` of them."""
    most_in_a_row: int = 16
    min_samples: int = 3
    max_samples: int = 11


ON_GPU = Effort(2e-3, 20e-3)
ON_CPU = Effort(4e-3, 80e-3)


class Clock:
    """Times calls on this rank's device."""

    def __init__(self) -> None:
        device = host.device()
        self.on_gpu = device.type == "cuda"
        self.effort = ON_GPU if self.on_gpu else ON_CPU
        self.flush: torch.Tensor | None = None
        if self.on_gpu:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def seconds(self, calls: Sequence[Call], *, collective: bool, hurry: bool = False) -> float:
        """Seconds of one call: the median on the rank where that is largest. All ranks must ask at
        the same time.

        Args:
            calls: the same call on several sets of operands.
            collective: ranks wait for each other in it.
            hurry: take the fewest samples.
        """
        # The first call compiles, makes connections and fills the allocator's pool.
        for call in calls:
            call()
        # From the slowest rank's time, because all must make the same number of calls.
        first = slowest(self._sample(calls, 1, collective))
        effort = self.effort
        in_a_row = _between(1, int(effort.row_seconds / first), effort.most_in_a_row)
        wanted = int(effort.total_seconds / (in_a_row * first))
        num_samples = _between(effort.min_samples, wanted, effort.max_samples)
        if hurry:
            num_samples = effort.min_samples
        # Ranks share cores and links, so they must start together.
        slowest(0)
        samples = [self._sample(calls, in_a_row, collective) for _ in range(num_samples)]
        return slowest(statistics.median(samples))

    def _sample(self, calls: Sequence[Call], in_a_row: int, collective: bool) -> float:
        """Seconds of one call, as the mean of ``in_a_row`` of them."""
        host.synchronize()
        # While the device spins, the host queues the two events and all calls between.
        host.keep_busy(HOST_CYCLES_PER_CALL * (in_a_row + 2))
        if collective:
            # Not timed: it brings the ranks into step, so that no wait for the last one counts.
            calls[0]()
        elif self.flush is not None:
            self.flush.zero_()
        start = host.Stopwatch.mark()
        for i in range(in_a_row):
            calls[i % len(calls)]()
        end = host.Stopwatch.mark()
        # A coarse clock may see no time pass; callers divide by this.
        return max(host.seconds_between(start, end) / in_a_row, 1e-9)


def _between(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))
