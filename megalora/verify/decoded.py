"""Give transformers' loader the quantised weights of a folder as if they were stored plain."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megalora.hf.json_file import read_hf_config
from megalora.model.account import open_folder
from megalora.model.base_weights import BaseWeights
from megalora.model.fields import QUANTISED
from megalora.model.quantised.scheme import UNROUNDED, Rounded
from megalora.model.stored_tensors import Place


class Decoded:
    """A quantised weight, decoded when it is indexed."""

    def __init__(self, weights: BaseWeights, name: str, size: tuple[int, int]) -> None:
        self.weights = weights
        self.name = name
        self.size = size

    def __getitem__(self, index: Any) -> Tensor:
        return self.weights[self.name][index]

    def get_dtype(self) -> str:
        # Float32 values, which the loader rounds to the dtype of the run.
        return "F32"

    def get_shape(self) -> list[int]:
        return list(self.size)


def base_size(place: Place) -> tuple[int, int]:
    """Rows and columns of a plain matrix."""
    rows, columns = place.tensor.shape[-2:]
    if place.rows is not None:
        rows = place.rows[1] - place.rows[0]
    return rows, columns


class QuantisedWeights(NamedTuple):
    """Quantised weights of a folder."""

    weights: dict[str, Decoded]
    """By published name."""
    parts: set[str]
    """Stored names of the tensors that stand for them, and of those that are not read."""


def quantised_weights(folder: Path, nf4: Rounded = UNROUNDED) -> QuantisedWeights:
    """The only tensors that are not read by transformers' own code: our decoders, which tests hold
    against the libraries that define each form."""
    # A folder of plain weights is not opened by our reading at all.
    if not (read_hf_config(folder).get(QUANTISED) or nf4):
        return QuantisedWeights({}, set())
    base = open_folder(folder)
    weights = BaseWeights(base, nf4=nf4)
    found = QuantisedWeights({}, set())
    for name, place in base.places.items():
        if name in nf4:
            size = base_size(place)
            found.weights[name] = Decoded(weights, name, size)
            found.parts.add(place.tensor.name)
        if place.quantised is None:
            continue
        assert base.scheme is not None
        found.weights[name] = Decoded(weights, name, place.quantised.size)
        module = place.tensor.name.removesuffix(base.scheme.marker)
        for ending in (*place.quantised.parts, *base.scheme.unread):
            found.parts.add(f"{module}{ending}")
    return found
