"""Replace the clock in tests of what measures time, so that no result depends on the machine."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalora import host

NANOSECOND = 1e-9


class MadeUpClock:
    """Replaces the clock that ``host.Stopwatch`` reads, until the end of this forked process.

    Args:
        tick: seconds that pass between two looks at it; other time passes only by ``pass_time``.
    """

    def __init__(self, tick: float) -> None:
        self.now = 0.0
        self.tick = tick
        host.Stopwatch.mark = self.look  # type: ignore[method-assign]

    def look(self) -> float:
        self.now += self.tick
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


class WorkTakesTime(TorchDispatchMode):
    """Every operation of torch takes a nanosecond for each multiplication or addition of a product,
    and for each element of others, by the given clock."""

    def __init__(self, clock: MadeUpClock) -> None:
        super().__init__()
        self.clock = clock

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        # A view moves no data, so it takes no time.
        if not func.is_view:
            self.clock.pass_time(NANOSECOND * work(str(func), args, found))
        return found


def work(name: str, args: tuple[Any, ...], found: Any) -> int:
    """Multiplications and additions of a product, elements of anything else."""
    given = tensors_in(args)
    if "mm." in name:
        # [M, K] times [K, N] or [groups, K, N]. The offsets of a grouped product come after its
        # operands and are integers.
        factors = [t for t in given if t.is_floating_point()]
        inner_size = factors[-1].shape[-2]
        return 2 * found.numel() * inner_size
    if "attention" in name:
        # Forward is given q, k, v; backward the gradient before them. All are [B, heads, S, d].
        first = 1 if "backward" in name else 0
        query = given[first]
        key = given[first + 1]
        return 2 * query.numel() * key.shape[-2]
    elements = 0
    for tensor in [*given, *tensors_in(found)]:
        elements += tensor.numel()
    return elements


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Tensors of nested tuples and lists, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
