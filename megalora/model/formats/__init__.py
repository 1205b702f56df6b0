"""How frozen weights lie in memory: chosen before a model is built, so that weights are
loaded to where they stay."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megalora.model.formats.plain import PLAIN

if TYPE_CHECKING:
    import torch

    from megalora.model.formats.coded import Coded

type Sizes = tuple[int, int, int]
"""``(E, N, K)`` of a weight on one rank: experts, outputs, inputs."""


class WeightFormat(Protocol):
    """One way to store a frozen ``[E, N, K]``."""

    def num_bytes(self, sizes: Sizes, item_bytes: int) -> int:
        """Bytes of the stored weight on this rank."""
        ...

    def allocate(self, sizes: Sizes, dtype: "torch.dtype", device: "torch.device") -> Any:
        """What holds the weight, whose values are not set yet: a tensor, ``AugmentedWeight`` or
        ``HeldCodes``."""
        ...


class ExpertFormats(NamedTuple):
    """Formats of one layer's weights: the two fused ones of its experts, and linears."""

    gate_up: WeightFormat = PLAIN
    down: WeightFormat = PLAIN
    linears: Mapping[str, "Coded"] = {}
    """Megatron's module -> format, of dense linears that are not plain."""


BOTH_PLAIN = ExpertFormats()

type LayerFormats = Mapping[int, ExpertFormats]
"""Layer -> formats of its weights, where they are not all plain."""

ALL_PLAIN: LayerFormats = {}
