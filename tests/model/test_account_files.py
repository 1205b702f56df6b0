"""Check what is refused of a base's files: indices that contradict them, damage, other formats."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.hf import folder as bridge_folder
from megalora.hf.folder import weight_shards
from megalora.model import stored_tensors as stored_module
from megalora.model.account import open_folder
from megalora.tiny import make_tiny
from tests.model.accounts import copy_of, refusal
from tests.oracles.base import (
    make_base,
    own_logits,
    transformers_logits,
)

NORM = "model.norm.weight"
"""The tensor that the changed indices below are wrong about."""


def without_norm(names: dict[str, str]) -> dict[str, str]:
    return {name: file for name, file in names.items() if name != NORM}


def norm_in_another_file(names: dict[str, str]) -> dict[str, str]:
    # The norm is in the last shard.
    return names | {NORM: min(names.values())}


def edit_index(folder: Path, change: Any) -> Path:
    """Replace the index's map from names to files by what ``change`` makes of it."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = change(content["weight_map"])
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_norm, "does not name 1 tensors that its files hold (model.norm.weight)"),
        (
            lambda names: names | {"model.foo.weight": names[NORM]},
            "names 1 tensors that its files do not hold (model.foo.weight)",
        ),
        (
            norm_in_another_file,
            "names 1 tensors that its files do not hold (model.norm.weight)",
        ),
        # Published indices still name inverse frequencies that their files no longer hold.
        (lambda names: names | {"model.rotary_emb.inv_freq": names[NORM]}, None),
        (lambda names: {}, "has no weight_map from tensor names to files"),
        (lambda names: [1], "has no weight_map from tensor names to files"),
        (lambda names: {"a": 3}, "has no weight_map from tensor names to files"),
    ],
)
def test_an_index_and_its_files_must_agree(tmp_path: Path, change: Any, said: str | None) -> None:
    folder = make_tiny(tmp_path / "base", num_hidden_layers=2)
    index = edit_index(folder, change)
    if said is None:
        open_folder(folder)
    else:
        assert f"{index} {said}" in refusal(folder)


def test_one_file_comes_before_an_index_of_others(tmp_path: Path) -> None:
    """As in transformers: the shards and the index of another model beside it are passed over."""
    folder = make_base(tmp_path / "base")
    expected = own_logits(folder)
    # The same sizes, so that the wrong weights would load without an error.
    other = make_tiny(tmp_path / "other", num_hidden_layers=2, seed=5)
    for path in [*other.glob("*.safetensors"), *other.glob("*.index.json")]:
        (folder / path.name).write_bytes(path.read_bytes())
    assert torch.equal(own_logits(folder), expected)
    assert (transformers_logits(folder) - expected).abs().max() <= 1e-5


# A safetensors file is 8 bytes with the length of its header, the header as JSON (for each tensor
# its dtype, shape and place), and the tensors.
@pytest.mark.parametrize(
    ("change", "said"),
    [
        # A download that broke off, and a length beyond the file.
        (lambda raw: raw[:4], "its header would have"),
        (
            lambda raw: (10**9).to_bytes(8, "little") + raw[8:],
            "its header would have 1,000,000,000 bytes",
        ),
        (lambda raw: raw[:8] + b"x" + raw[9:], "Expecting value"),
        # Bytes that no tensor owns.
        (lambda raw: raw + b"more", "its tensors end at byte"),
        # Half as many bytes as the shape needs, no place at all, a place that begins too late.
        (lambda raw: raw.replace(b'"F32"', b'"F16"', 1), "is described as {'dtype': 'F16'"),
        (lambda raw: raw.replace(b'"data_offsets"', b'"data_offset_"', 1), "is described as"),
        (
            lambda raw: raw.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
            "is described as",
        ),
    ],
)
def test_a_file_that_is_no_safetensors(tmp_path: Path, change: Any, said: str) -> None:
    folder = make_base(tmp_path / "base", "qwen3")
    shard = folder / "model.safetensors"
    shard.write_bytes(change(shard.read_bytes()))
    message = rf"{re.escape(str(shard))} is not a whole safetensors file \(.*{re.escape(said)}"
    assert re.search(message, refusal(folder))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        # torch's pickles, Meta's and Mistral's own files, llama.cpp's format.
        ("pytorch_model.bin", "pytorch_model.bin is not read: save the model as safetensors"),
        (
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00001-of-00002.bin is not read: save the model as safetensors",
        ),
        ("consolidated.00.pth", "consolidated.00.pth is not read: save the model as safetensors"),
        ("Qwen3-8B-Q4_K_M.gguf", "Qwen3-8B-Q4_K_M.gguf is not read: save the model as safetensors"),
        # Other files with such suffixes are no weights; neither is any other file.
        ("training_args.bin", "download the model again"),
        ("config.old", "download the model again"),
        (
            "adapter_model.safetensors",
            "adapter_model.safetensors is an adapter, which needs its base model here",
        ),
        (
            "model-00001-of-00001.safetensors",
            (
                "model-00001-of-00001.safetensors is named by no model.safetensors.index.json: "
                "save or download the model again with its index"
            ),
        ),
    ],
)
def test_weights_in_another_form_are_named(
    bases: dict[str, Path], tmp_path: Path, name: str, advice: str
) -> None:
    folder = copy_of(bases["qwen3"], tmp_path / "base")
    (folder / "model.safetensors").rename(folder / name)
    assert (
        refusal(folder)
        == f"{folder}: 1 of 1 weight shards are missing (model.safetensors); {advice}"
    )


def test_a_pointer_of_git_lfs_is_called_one(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(bases["qwen3"], tmp_path / "base")
    # What git clone leaves in place of a large file where git-lfs is not installed.
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n"
    )
    assert "it is a pointer of Git LFS, in place of the file: run git lfs pull" in refusal(folder)


def test_every_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of ranks read the headers of hundreds of shards, often over a network."""
    folder = make_tiny(tmp_path / "base")
    opened: list[str] = []
    read = stored_module.read_header

    def counted(path: Path) -> Any:
        opened.append(path.name)
        return read(path)

    # Both modules have imported the function under its name.
    monkeypatch.setattr(stored_module, "read_header", counted)
    monkeypatch.setattr(bridge_folder, "read_header", counted)
    open_folder(folder)
    assert sorted(opened) == weight_shards(folder)
