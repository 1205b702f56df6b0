"""How frozen expert weights lie in memory: chosen before a model is built, so that weights are
loaded to where they stay."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megalora.model.formats.plain import PLAIN

if TYPE_CHECKING:
    import torch

type Sizes = tuple[int, int, int]
"""``(E, N, K)`` of a weight on one rank: experts, outputs, inputs."""


class WeightFormat(Protocol):
    """One way to store a frozen ``[E, N, K]``."""

    def num_bytes(self, sizes: Sizes, item_bytes: int) -> int:
        """Bytes of the stored weight on this rank."""
        ...

    def allocate(self, sizes: Sizes, dtype: "torch.dtype", device: "torch.device") -> Any:
        """What the kernels take as the weight; its values are not set yet."""
        ...

    def matrix(self, stored: Any) -> "torch.Tensor":
        """The weight ``[E, N, K]`` inside ``stored``: a view, which loading writes to."""
        ...


class ExpertFormats(NamedTuple):
    """Formats of the two fused weights of one layer's experts."""

    gate_up: WeightFormat = PLAIN
    down: WeightFormat = PLAIN


BOTH_PLAIN = ExpertFormats()

type LayerFormats = Mapping[int, ExpertFormats]
"""Layer -> formats of its experts, where they are not both plain."""

ALL_PLAIN: LayerFormats = {}
