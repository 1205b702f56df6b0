"""Read a base folder's tensors by their published names, one at a time, wherever and however they
are stored."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megalora.model.account import BaseFolder
from megalora.model.quantised.decode import decode
from megalora.model.quantised.part import Part, Stored
from megalora.model.quantised.scheme import UNROUNDED, Rounded
from megalora.model.quantised.to_nf4 import rounded
from megalora.model.stored_tensors import Place, Quantised

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of plain weights, by their names in safetensors headers."""


class BaseWeights(Mapping[str, Tensor]):
    """Published name -> tensor. Files are mapped into memory, so only what is asked for is read; of
    a packed tensor one expert's rows."""

    def __init__(
        self,
        base: BaseFolder,
        dtype: torch.dtype = torch.float32,
        nf4: Rounded = UNROUNDED,
    ) -> None:
        """``dtype``: that of decoded matrices, whose values are computed in float32 and rounded
        once; plain tensors keep the dtype of their file. ``nf4``: names of plain matrices that
        are quantised as they are read, and mean the decoded values."""
        self._base = base
        self._dtype = dtype
        self._nf4 = nf4
        self._files: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        place = self._base.places[name]
        if place.quantised is not None:
            return self._decoded(name, place.quantised)
        if name in self._nf4:
            return rounded(self._plain(place), self._nf4[name]).to(self._dtype)
        return self._plain(place)

    def _plain(self, place: Place) -> Tensor:
        """A tensor as it is stored."""
        if place.expert is None or place.rows is None:
            return self._file(place).get_tensor(place.tensor.name)
        # [experts, rows, columns] -> this expert's rows: a slice is read, not the whole tensor.
        first, end = place.rows
        return self._slice(place)[place.expert, first:end]

    @property
    def folder(self) -> Path:
        """Folder of the base, for messages."""
        return self._base.folder

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block of fp8."""
        assert self._base.scheme is not None
        return self._base.scheme.block

    def stored(self, name: str) -> Stored | None:
        """The tensors that stand for a quantised weight, by ending; None for a plain one."""
        quantised = self._base.places[name].quantised
        if quantised is None:
            return None
        return {ending: self._slice(place) for ending, place in quantised.parts.items()}

    def part(self, name: str, part: Part) -> Tensor:
        """A part of a matrix that is stored plain; nothing else of it is read."""
        place = self._base.places[name]
        n0, n1, k0, k1 = part
        if place.expert is None or place.rows is None:
            return self._slice(place)[n0:n1, k0:k1]
        first, _ = place.rows
        return self._slice(place)[place.expert, first + n0 : first + n1, k0:k1]

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
