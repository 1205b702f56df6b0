"""Write the tensors of an adapter folder as other files than PEFT's of today: pickles, shards, and
what is no file."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.files import WEIGHTS
from megalora.adapters.read.weights import PICKLE
from tests.named_tensors import Tensors

# Names as transformers has given them to shards of models since 2022.
SHARDS = [f"adapter_model-0000{n}-of-00003" for n in (1, 2, 3)]
INDEX = "adapter_model.safetensors.index.json"


def in_pickle(folder: Path, **options: object) -> None:
    """Replace the file by a pickle, written with ``options`` of torch.save."""
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE, **options)
    (folder / WEIGHTS).unlink()


def save_as(form: str, tensors: Tensors, path: Path) -> None:
    """Write ``path`` as a file of safetensors, or with "bin" as a pickle."""
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def in_shards(folder: Path, form: str = "safetensors", *, index: bool = True) -> None:
    """Replace the file by three shards; every A and its B are apart."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    # Sorted, an A and its B are neighbours, and every third tensor goes into the same shard.
    for at, shard in enumerate(SHARDS):
        part = {name: tensors[name] for name in names[at::3]}
        weight_map |= dict.fromkeys(part, f"{shard}.{form}")
        save_as(form, part, folder / f"{shard}.{form}")
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"adapter_model.{form}.index.json").write_text(text)
    (folder / WEIGHTS).unlink()


def pipe(name: str) -> Callable[[Path], object]:
    """Replace a file by a pipe that nobody writes to."""

    def put(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return put
