"""How the frozen weights of a case lie in memory: folders that a run reads, and plain folders of
the same values, which the oracle reads."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.oracles import quantised
from tests.oracles.base import stored_tensors

BASES = ("plain", "fp8", "nf4")
"""Plain, published as blocks of fp8, and quantised to nf4 while a plain folder is read; the latter
two stay codes in memory. Values of ``model.weight_format``."""
NF4_BLOCK = 64


def read_folder(base: Path, how: str) -> Path:
    """The folder that a run reads."""
    return base.with_name(f"{base.name} fp8") if how == "fp8" else base


def decoded_folder(base: Path, how: str) -> Path:
    """The plain folder of the values that it computes with."""
    return base if how == "plain" else base.with_name(f"{base.name} {how} decoded")


def make_folders(base: Path, how: str) -> None:
    """Make both beside a plain base, unless they are there."""
    decoded = decoded_folder(base, how)
    if decoded.exists():
        return
    if how == "fp8":
        values = quantised.quantise_folder(base, read_folder(base, how), "fp8")
    else:
        values = {}
        for name, tensor in stored_tensors(base).items():
            if quantised.is_linear(name):
                values[name] = nf4_by_rows(tensor)
    quantised.plain_folder(base, decoded, values)


def nf4_by_rows(w_NK: Tensor) -> Tensor:
    """bitsandbytes' nf4 values of a matrix none of whose blocks goes over the end of a row."""
    columns = w_NK.shape[1]
    # Zeros raise no scale, and are cut off again.
    padded = pad(w_NK, (0, -columns % NF4_BLOCK))
    _, values = quantised.nf4(padded)
    assert values.dtype == torch.float32, "the runs compute in float32"
    return values[:, :columns]
