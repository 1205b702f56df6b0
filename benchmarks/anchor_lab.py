"""Measure and check one anchor: sizes, times, results, and the range that a value is expected
in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_case import ALLOWED, relative_errors
from benchmarks.gpu_timing import Stats, measure
from benchmarks.tile_gpus import Gpu


@dataclass(frozen=True)
class Expected:
    """A value and the range in which the assumptions behind it hold."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Found:
    """What was measured, in the anchor's unit, and what else is worth keeping."""

    value: float
    more: dict[str, Any] = field(default_factory=dict)


class NotAvailableError(Exception):
    """The machine does not tell this value: its row is empty, and that is no failure of ours."""


class WrongResultError(Exception):
    """A result is wrong, so its time is not reported."""


@dataclass(frozen=True)
class Lab:
    """Where anchors are measured."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    dry: bool
    """Tiny sizes: times mean nothing."""

    def size(self, full: int, tiny: int) -> int:
        """The size to measure at, or a tiny one in a dry run."""
        return tiny if self.dry else full

    def times(self, call: Callable[[], object]) -> Stats:
        """Time a call with an empty L2."""
        return measure({"it": call}, self.device, self.repeats)["it"]

    def us(self, call: Callable[[], object]) -> float:
        """Return the median of a call in microseconds."""
        return 1e3 * self.times(call).median_ms

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        """Random numbers N(0, size^2), never zeros: a GPU computes those with less power, so at a
        higher clock."""
        # Another seed for another shape, so that operands differ.
        generator = torch.Generator(self.device).manual_seed(len(shape) + shape[-1])
        return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtype).mul_(
            size
        )

    def check(self, what: str, got: Tensor, want: Tensor) -> None:
        """Raise ``WrongResultError`` where the 2-norm of the difference, relative to that of
        ``want``, is beyond what the dtype allows."""
        # Written so that NaN, which is not less than anything, raises too.
        error = relative_errors({what: got}, {what: want})[what]
        if not error <= ALLOWED[self.dtype]:
            raise WrongResultError(
                f"{what} is off by {error:.1e}, allowed {ALLOWED[self.dtype]:.0e}"
            )


@dataclass(frozen=True)
class Anchor:
    """One thing to measure."""

    name: str
    unit: str
    measure: Callable[[Lab], Found]
    expect: Callable[[Gpu], Expected]
    below: str
    """What to conclude from a value below the range."""
    above: str
    """What to conclude from a value above it."""
