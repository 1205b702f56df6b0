"""A frozen weight of experts that is decoded when it is asked for, into memory that all layers
share.

``expert_mlp`` keeps no such weight for backward and asks again there, so that codes and scales are
what stays in memory, and one layer in the compute dtype.

Shape legend: E experts   N outputs   K inputs   R room for the adapter
"""

import torch

from .augmented_weight import AugmentedWeight
from .quantised_weight import QuantisedWeight


class Scratch:
    """Memory for one decoded weight at a time; one stream may use it.

    What it holds is known by its owner, so that asking twice in a row decodes once.
    """

    def __init__(self) -> None:
        self._flat: torch.Tensor | None = None
        self.owner: object = None
        """Whose values it holds; None while it holds none."""
        self.sizes: tuple[int, ...] = ()
        """Sizes of the buffer that was filled last."""
        self.blocks: list[tuple[slice, slice]] = []
        """Where B's were written in that buffer; zeros lie beside them."""
        self.filled = 0
        """How often something was decoded into it."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are reserved."""
        return 0 if self._flat is None else self._flat.nbytes

    def reserve(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        """Have room for so many elements; before anything is decoded."""
        if self._flat is None or self._flat.numel() < elements:
            self._flat = torch.empty(elements, dtype=dtype, device=device)
            self.owner = None

    def view(self, sizes: tuple[int, ...]) -> torch.Tensor:
        """The first elements as a tensor of these sizes."""
        assert self._flat is not None, "reserve comes first"
        elements = 1
        for size in sizes:
            elements *= size
        return self._flat[:elements].view(sizes)

    def filled_by(
        self, owner: object, codes: QuantisedWeight, sizes: tuple[int, ...]
    ) -> torch.Tensor:
        """The buffer ``sizes`` whose first N rows and K columns hold the decoded weight.

        Args:
            owner: stands for the codes, which it never changes without ``forget``.
            sizes: ``[E, N + R, K + R]``.
        """
        buffer = self.view(sizes)
        if self.owner is not owner:
            # The room is zero where no B is written, and lies elsewhere in a buffer of other sizes.
            if sizes != self.sizes:
                buffer.zero_()
                self.blocks = []
            self.sizes = sizes
            codes.decode_into(buffer[:, : codes.sizes[1], : codes.sizes[2]])
            self.owner = owner
            self.filled += 1
        return buffer

    def forget(self) -> None:
        """Decode anew at the next call, whoever asks."""
        self.owner = None


class CodedWeight(AugmentedWeight):
    """``AugmentedWeight`` whose weight is decoded into a ``Scratch`` when it is asked for; with
    rank 0 it has no room."""

    def __init__(
        self, codes: QuantisedWeight, rank: int, dtype: torch.dtype, scratch: Scratch, owner: object
    ) -> None:
        """``scratch`` has room for ``[E, N + R, K + R]`` of this dtype; ``owner`` as in
        ``filled_by``."""
        E, self.N, self.K = codes.sizes
        # As in ``AugmentedWeight``: Triton vectorises only strides that are multiples of 16.
        self.room = rank + -rank % 16
        self.codes = codes
        self.dtype = dtype
        self._scratch = scratch
        self._owner = owner
        self._sizes = (E, self.N + self.room, self.K + self.room)

    @property
    def like(self) -> torch.Tensor:
        """``[E, N, K]``: sizes, strides and dtype of ``weight``; the values are any."""
        return self._scratch.view(self._sizes)[:, : self.N, : self.K]

    @property
    def weight(self) -> torch.Tensor:
        """``[E, N, K]``, valid until another weight is decoded."""
        return self.buffer[:, : self.N, : self.K]

    def own_copy(self) -> torch.Tensor:
        # Not the scratch, which has another weight's values by the time of backward.
        return self.codes.dequantised(self.dtype)

    @property
    def buffer(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[E, N + R, K + R]`` around it."""
        return self._scratch.filled_by(self._owner, self.codes, self._sizes)

    @property
    def _blocks(self) -> list[tuple[slice, slice]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Those of the layer that was here before, perhaps.
        return self._scratch.blocks

    @_blocks.setter
    def _blocks(self, blocks: list[tuple[slice, slice]]) -> None:
        self._scratch.blocks = blocks
