"""Say what training needs to know of a loss, so that the training step knows no loss itself.

A loss is a plain sum of terms that are divided already. What divides them is counted from the data
of the whole global batch before any pass, so that two units in one loss (tokens and pairs), any
microbatch size and any layout agree. A mean per microbatch or per rank would weigh tokens by how
samples happen to be spread.

Legend: N target tokens of a microbatch on this rank, Q sequences in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.comm import sum_alike, sum_over
from megalora.model.vocab_logits import Reader


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a microbatch, in the order of the row. Filler is none of them."""

    numbers: Tensor
    """[N] int64: the sequence that each target token belongs to."""
    targets: Tensor
    """[Q] int64: target tokens of each sequence, those on other context-parallel ranks included."""
    cp: ProcessGroup
    """Ranks that share the row."""
    references: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a ``Reference`` -> [Q], its log-probabilities of each sequence's target tokens,
    added up; without gradients."""
    means: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a ``Reference`` over mismatched sequences -> scalar, the mean of such sums over the
    global batch."""
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[Q] float32: what each sequence is compared with, its label, value, margin or advantage;
    zeros where it has none."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> [N], a number for each target token: what the data gives, and under the name of a
    ``Reference`` by token its log-probabilities; without gradients."""

    def sums(self, values_N: Tensor) -> Tensor:
        """[Q] float64: sums over each sequence, over all ranks that share the row. Whatever is
        computed from them is alike on these ranks and counts once."""
        # Losses live on differences of such sums: of a thousand tokens, float32 has four digits
        # behind the point.
        own = torch.zeros(len(self.targets), dtype=torch.float64, device=values_N.device)
        return sum_alike(own.index_add(0, self.numbers, values_N.double()), self.cp)

    def spread(self, values_N: Tensor) -> Tensor:
        """[N] float64: the sum over the sequence of each target token, on all ranks that share the
        row. Here each token's term is its own rank's, so that a gradient is the sum of all ranks'.
        """
        own = torch.zeros(len(self.targets), dtype=torch.float64, device=values_N.device)
        own = own.index_add(0, self.numbers, values_N.double())
        return sum_over(own, self.cp)[self.numbers]

    def once(self, value: Tensor) -> Tensor:
        """``value``, which all ranks that share the row have computed, on the first of them, and
        zero on the others: what is reported is added up over ranks."""
        return value if self.cp.rank() == 0 else torch.zeros_like(value)


WhichModel = Literal["base", "start", "recompute", "current"]
"""The base with the adapters switched off, the adapter that the run began with, the one at the
first step on the same rollouts, or the model as it is."""


@dataclass(frozen=True)
class Reference:
    """A pass without gradients and without dropout that comes before a step's own: the sums over
    sequences that it finds stand in ``Sequences.references``, or each token in
    ``Sequences.columns``."""

    name: str
    model: WhichModel = "base"
    mismatched: bool = False
    """Whether it reads prompts of the global batch with the answers to other ones, of which the
    mean stands in ``Sequences.means``."""
    by_token: bool = False
    """Whether its log-probabilities are kept by token."""


@dataclass(frozen=True, eq=False)
class Loss:
    """What one microbatch adds on one rank."""

    sum: Tensor
    """Scalar: terms divided by the counts of the global batch. Gradients are those of the sum over
    all microbatches and ranks."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Name -> (sum, count) of a number to report, without gradients; what is reported is the sum of
    sums over the sum of counts. Of a name that ends in ``_max`` both are largest values, not below
    0, and so is what is reported."""


class Objective(Protocol):
    """A loss over log-probabilities of given tokens."""

    @property
    def references(self) -> tuple[Reference, ...]:
        """The passes that come first."""
        ...

    @property
    def by_sequence(self) -> bool:
        """Whether ``loss`` needs to know which sequence a token belongs to."""
        ...

    @property
    def want(self) -> Mapping[str, Reader]:
        """What the head must read from the logits, by the names under which ``loss`` finds it;
        nothing where a score head stands in its place, of which ``loss`` finds ``scores``."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what ``loss`` reports, what it minimises first, largest values last."""
        ...

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Those of ``metrics`` that an evaluation reports, what it takes for its loss first."""
        ...

    @property
    def unit(self) -> str:
        """What the count beside an evaluation's loss counts, in the plural."""
        ...

    def divisors(self, rows: Iterable[Sequence[int]]) -> dict[str, int]:
        """Unit -> its number in these rows, on the host. The step adds up what each rank counts in
        its own share of the global batch.

        Args:
            rows: number of target tokens of each sequence of each row.
        """
        ...

    def loss(
        self,
        outputs: Mapping[str, Any],
        sequences: Sequences | None,
        divisors: Mapping[str, Tensor],
    ) -> Loss:
        """The loss of a microbatch's N target tokens.

        Args:
            outputs: what ``want`` names, ``[N]`` each, or ``scores [N, C]`` of C labels.
            sequences: given where ``by_sequence`` says so.
            divisors: unit -> its number in the global batch, scalars, at least 1.
        """
        ...
