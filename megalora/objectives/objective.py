"""Say what training needs to know of a loss, so that the training step knows no loss itself.

A loss is a plain sum of terms that are divided already. What divides them is counted from the data
of the whole global batch before any pass, so that two units in one loss (tokens and pairs), any
microbatch size and any layout agree. A mean per microbatch or per rank would weigh tokens by how
samples happen to be spread.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megalora.model.vocab_logits import Reader

Columns = Mapping[str, Tensor]
"""Name -> what there is for each token of a microbatch, in the order of the tokens."""


@dataclass(frozen=True, eq=False)
class Loss:
    """What one microbatch adds on one rank."""

    sum: Tensor
    """Scalar: terms divided by the counts of the global batch. Gradients are those of the sum over
    all microbatches and ranks."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Name -> (sum, count) of a number to report, without gradients; what is reported is the sum of
    sums over the sum of counts."""


class Objective(Protocol):
    """A loss over log-probabilities of given tokens."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that ``loss`` reads."""
        ...

    @property
    def want(self) -> Mapping[str, Reader]:
        """What the head must read from the logits, by the names under which ``loss`` finds it."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what ``loss`` reports, what it minimises first."""
        ...

    @property
    def evaluated(self) -> str:
        """The one of ``metrics`` that an evaluation reports as its loss."""
        ...

    def divisors(self, microbatches: Iterable[Columns]) -> dict[str, int]:
        """Unit -> its number in these microbatches, on the host. The step adds up what each rank
        counts in its own share of the global batch."""
        ...

    def loss(
        self, outputs: Mapping[str, Any], columns: Columns, divisors: Mapping[str, Tensor]
    ) -> Loss:
        """The loss of N tokens of a microbatch.

        Args:
            outputs: what ``want`` names, ``[N]`` each.
            columns: what ``columns`` names, ``[N]`` each.
            divisors: unit -> its number in the global batch, scalars, at least 1.
        """
        ...
