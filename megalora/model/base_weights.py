"""Read a base folder's tensors by their published names, one at a time, wherever and however they
are stored."""

from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megalora.model.account import BaseFolder


class BaseWeights(Mapping[str, Tensor]):
    """Published name -> tensor. Files are mapped into memory, so only what is asked for is read; of
    a packed tensor one expert's rows."""

    def __init__(self, base: BaseFolder) -> None:
        self._base = base
        self._files: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        place = self._base.places[name]
        # Each file is opened once: an expert's matrix is one of thousands in it.
        if place.shard not in self._files:
            self._files[place.shard] = safe_open(
                str(self._base.folder / place.shard), framework="pt"
            )
        file = self._files[place.shard]
        if place.expert is None or place.rows is None:
            return file.get_tensor(place.tensor.name)
        # [experts, rows, columns] -> this expert's rows: a slice is read, not the whole tensor.
        first, end = place.rows
        return file.get_slice(place.tensor.name)[place.expert, first:end]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base.places)

    def __len__(self) -> int:
        return len(self._base.places)
