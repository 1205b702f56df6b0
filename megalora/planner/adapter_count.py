"""Count a rank's adapter parameters by who reduces their gradients."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterCount:
    """Adapter parameters of a chunk on one rank, by the data-parallel group that reduces them.

    A buffer starts every tensor at a multiple of ``ALIGNMENT``; the numbers with ``_padded`` count
    the gaps too.
    """

    dense: int = 0
    expert: int = 0
    dense_padded: int = 0
    expert_padded: int = 0

    def __add__(self, other: "AdapterCount") -> "AdapterCount":
        return AdapterCount(
            self.dense + other.dense, self.expert + other.expert,
            self.dense_padded + other.dense_padded, self.expert_padded + other.expert_padded,
        )  # fmt: skip

    def times(self, n: int) -> "AdapterCount":
        return AdapterCount(
            n * self.dense, n * self.expert, n * self.dense_padded, n * self.expert_padded
        )
