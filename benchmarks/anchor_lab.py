"""Where anchors are measured: sizes, times, checks, and what a value is compared with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_case import ALLOWED, relative_errors
from benchmarks.gpu_timing import Stats, measure
from benchmarks.tile_model import Gpu


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
    """The machine does not tell: a row without a value, and no failure of ours."""


class WrongResultError(Exception):
    """A result is not what it should be: no time is given for it."""


@dataclass(frozen=True)
class Lab:
    """Where anchors are measured."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    dry: bool
    """Tiny sizes: times mean nothing."""

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.dry else full

    def times(self, call: Callable[[], object]) -> Stats:
        """Time a call with an empty L2."""
        return measure({"it": call}, self.device, self.repeats)["it"]

    def us(self, call: Callable[[], object]) -> float:
        """Return the median of a call in microseconds."""
        return 1e3 * self.times(call).median_ms

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(len(shape) + shape[-1])
        return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtype).mul_(
            size
        )

    def check(self, what: str, got: Tensor, want: Tensor) -> None:
        """Raise where the 2-norm of the difference is beyond what the dtype allows; NaN is."""
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
