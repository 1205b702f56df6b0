"""How long a call takes on every rank at once, and what the slowest rank says of it.

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
    return min(MOST_COPIES, -(-FLUSH_BYTES // max(num_bytes, 1))) if on_gpu else 1


@dataclass(frozen=True)
class Effort:
    """How long to look at one size."""

    row_seconds: float
    """Of calls in a row, at most ``most_in_a_row``, that make one sample."""
    total_seconds: float
    """Of all samples of a size, but at least ``min_samples`` and at most ``max_samples`` of
    them."""
    most_in_a_row: int = 16
    min_samples: int = 3
    max_samples: int = 11


ON_GPU = Effort(2e-3, 20e-3)
ON_CPU = Effort(4e-3, 80e-3)


class Clock:
    def __init__(self) -> None:
        device = host.device()
        self.on_gpu = device.type == "cuda"
        self.effort = ON_GPU if self.on_gpu else ON_CPU
        self.flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.on_gpu else None
        )

    def seconds(self, calls: Sequence[Call], *, collective: bool, hurry: bool = False) -> float:
        """Seconds of one call: the median on the rank where that is largest. All ranks must ask at
        the same time.

        Args:
            calls: the same call on several sets of operands.
            collective: ranks wait for each other in it.
            hurry: take the fewest samples.
        """
        for call in calls:  # compiles, makes connections, fills the allocator's pool
            call()
        first = slowest(self._sample(calls, 1, collective))
        # From what all ranks agree on: they must make the same number of calls.
        effort = self.effort
        in_a_row = _between(1, int(effort.row_seconds / first), effort.most_in_a_row)
        num_samples = _between(
            effort.min_samples, int(effort.total_seconds / (in_a_row * first)), effort.max_samples
        )
        num_samples = effort.min_samples if hurry else num_samples
        slowest(0)  # ranks share cores, and links: they start together
        return slowest(
            statistics.median(self._sample(calls, in_a_row, collective) for _ in range(num_samples))
        )

    def _sample(self, calls: Sequence[Call], in_a_row: int, collective: bool) -> float:
        host.synchronize()
        host.keep_busy(HOST_CYCLES_PER_CALL * (in_a_row + 2))
        if collective:
            # not timed: brings the ranks into step, so that nobody's wait for the last one counts
            calls[0]()
        elif self.flush is not None:
            self.flush.zero_()
        start = host.Stopwatch.mark()
        for i in range(in_a_row):
            calls[i % len(calls)]()
        end = host.Stopwatch.mark()
        return max(
            host.seconds_between(start, end) / in_a_row, 1e-9
        )  # a clock may be too coarse, and nothing takes no time


def _between(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))
