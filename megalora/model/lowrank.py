"""What a caller may add to a fused expert weight."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A delta ``B A`` for one fused weight: a ``[E, R, in]``, b ``[E, out, R]`` with the scale inside."""

    a: Tensor
    b: Tensor
    dropout: float = 0.0
    """Probability of zeroing an input of A (the base sees the input whole)."""
