"""Read a base folder's tensors by their published names, one at a time, wherever and however they
are stored."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megalora.model.account import BaseFolder
from megalora.model.quantised.decode import decode
from megalora.model.quantised.part import Part
from megalora.model.stored_tensors import Place, Quantised


class BaseWeights(Mapping[str, Tensor]):
    """Published name -> tensor. Files are mapped into memory, so only what is asked for is read; of
    a packed tensor one expert's rows."""

    def __init__(self, base: BaseFolder, dtype: torch.dtype = torch.float32) -> None:
        """``dtype``: that of decoded matrices, whose values are computed in float32 and rounded
        once; plain tensors keep the dtype of their file."""
        self._base = base
        self._dtype = dtype
        self._files: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        place = self._base.places[name]
        if place.quantised is not None:
            return self._decoded(name, place.quantised)
        if place.expert is None or place.rows is None:
            return self._file(place).get_tensor(place.tensor.name)
        # [experts, rows, columns] -> this expert's rows: a slice is read, not the whole tensor.
        first, end = place.rows
        return self._slice(place)[place.expert, first:end]

    def _decoded(self, name: str, quantised: Quantised) -> Tensor:
        """A quantised weight ``[N, K]``; raises ``ValueError`` that names it."""
        scheme = self._base.scheme
        assert scheme is not None
        stored = {ending: self._slice(place) for ending, place in quantised.parts.items()}
        # Always the whole matrix, and cut afterwards: the same values in every layout.
        try:
            values = decode(scheme, stored, Part.whole(quantised.size), quantised.size)
        except ValueError as error:
            raise ValueError(f"{self._base.folder}: {name}: {error}") from None
        return values.to(self._dtype)

    def _slice(self, place: Place) -> Any:
        return self._file(place).get_slice(place.tensor.name)

    def _file(self, place: Place) -> Any:
        # Each file is opened once: an expert's matrix is one of thousands in it.
        if place.shard not in self._files:
            path = self._base.folder / place.shard
            self._files[place.shard] = safe_open(str(path), framework="pt")
        return self._files[place.shard]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base.places)

    def __len__(self) -> int:
        return len(self._base.places)
