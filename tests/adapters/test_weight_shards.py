"""Refuse shards that are not one adapter, whole and once, and say which of them is wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.files import WEIGHTS
from megalora.adapters.read.weights import AdapterWeights
from tests.adapters.adapters import Trained
from tests.adapters.weight_files import INDEX, SHARDS, in_shards, pipe


def without(name: str) -> Callable[[Path], object]:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Let ``change`` edit the index's map from tensors to files."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def twice(folder: Path) -> None:
    """Put the first shard's tensors into the second too."""
    second = folder / f"{SHARDS[1]}.safetensors"
    tensors = load_file(folder / f"{SHARDS[0]}.safetensors")
    save_file(tensors | load_file(second), second)


# A change of a folder of three shards, and what the refusal says.
BROKEN_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (
        without(f"{SHARDS[1]}.safetensors"),
        rf"1 of 3 shards are missing \({SHARDS[1]}.safetensors\)",
    ),
    # Which of two sets is the adapter?
    "one too many": (
        lambda f: (f / "adapter_model-00004-of-00003.safetensors").touch(),
        "00004-of-00003.* is not one of 3 shards",
    ),
    "two sets": (
        lambda f: (f / "adapter_model-00001-of-00002.safetensors").touch(),
        "holds weights more than once",
    ),
    "beside a single file": (
        lambda f: save_file({"x": torch.ones(1)}, f / WEIGHTS),
        "holds weights more than once",
    ),
    # Which of the two counts would depend on the order of reading.
    "a tensor twice": (
        twice,
        rf"is both in {SHARDS[0]}.safetensors and in {SHARDS[1]}.safetensors",
    ),
    # The index and the shards must say the same.
    "a tensor the index lacks": (
        edit_index(dict.popitem),
        "1 tensors are not where it says, .* in None by the index",
    ),
    "a tensor that is nowhere": (
        edit_index(lambda m: m.update(gone=f"{SHARDS[0]}.safetensors")),
        "such as gone: .* None really",
    ),
    "an index of something else": (
        lambda f: (f / INDEX).write_text('{"weight_map": []}'),
        "weight_map must be an object",
    ),
    "a shard cut short": (
        lambda f: os.truncate(f / f"{SHARDS[2]}.safetensors", 1000),
        "is not a whole safetensors file",
    ),
    # What a clone without git-lfs leaves.
    "a pointer of Git LFS": (
        lambda f: (f / f"{SHARDS[1]}.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        "run git lfs pull",
    ),
    "a shard that is a pipe": (pipe(f"{SHARDS[2]}.safetensors"), "is not a regular file"),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_shards(stored: Trained, case: str) -> None:
    change, message = BROKEN_SHARDS[case]
    in_shards(stored.folder)
    change(stored.folder)
    with pytest.raises(ValueError, match=message):
        AdapterWeights(stored.folder)
