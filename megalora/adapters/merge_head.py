"""Change the head of a merged folder: let a tied lm_head be a weight of its own, or a score head
stand in its place."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megalora.adapters.merge_score import placed_score, score_of, with_entry
from megalora.adapters.read.adapter import Adapter
from megalora.hf.folder import INDEX
from megalora.hf.json_file import read_json_object
from megalora.hf.safetensors import Stored
from megalora.hf.tensor_names import EMBEDDING, LM_HEAD, published_name


@dataclass(frozen=True)
class Shard:
    """A file to write: its header, and in the order of its tensors where the base's file of that
    name has their bytes."""

    header: dict[str, Any]
    tensors: list[Stored]
    added: dict[str, Tensor] = field(default_factory=dict)
    """Name -> values of tensors that the base does not have."""


def stored_at(shards: dict[str, Shard]) -> dict[str, tuple[str, Stored]]:
    """Published name of every tensor -> the file that it is in, and its entry there."""
    at: dict[str, tuple[str, Stored]] = {}
    for name, shard in shards.items():
        for tensor in shard.tensors:
            at[published_name(tensor.name)] = (name, tensor)
    return at


def add_lm_head(folder: Path, shards: dict[str, Shard]) -> None:
    """Where a tied base has no lm_head, let it be the embedding's bytes once more, at the end of
    the embedding's file."""
    at = stored_at(shards)
    if EMBEDDING not in at:
        what = (
            "its head alone; save the model anew with both" if LM_HEAD in at else "neither weight"
        )
        raise ValueError(f"{folder} ties lm_head to {EMBEDDING}, and has {what}")
    if LM_HEAD in at:
        return
    name, embedding = at[EMBEDDING]
    header = shards[name].header
    tensors = shards[name].tensors
    # safetensors allows no gap: the data of a file's tensors end where the last one does.
    end = sum(tensor.num_bytes for tensor in tensors)
    place = {"data_offsets": [end, end + embedding.num_bytes]}
    shards[name] = Shard(
        header | {LM_HEAD: header[embedding.name] | place},
        [*tensors, replace(embedding, name=LM_HEAD)],
    )


def untie(folder: Path, shards: dict[str, Shard]) -> None:
    """Say in the result's config and index that lm_head is a weight of its own."""
    path = folder / "config.json"
    config = read_json_object(path, exact_numbers=False) | {"tie_word_embeddings": False}
    path.write_text(json.dumps(config, indent=2) + "\n")
    if not (folder / INDEX).is_file():
        return  # a single file needs no index
    index = read_json_object(folder / INDEX)
    if LM_HEAD in index["weight_map"]:
        return
    name, lm_head = _find_lm_head(shards)
    index["weight_map"][LM_HEAD] = name
    added = {"total_size": lm_head.num_bytes, "total_parameters": math.prod(lm_head.shape)}
    metadata = index.get("metadata", {})
    for key, number in added.items():
        # Not every tool that writes an index writes both.
        if key in metadata:
            metadata[key] += number
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _find_lm_head(shards: dict[str, Shard]) -> tuple[str, Stored]:
    """The file that lm_head is in, and its entry there."""
    for name, shard in shards.items():
        for tensor in shard.tensors:
            if tensor.name == LM_HEAD:
                return name, tensor
    raise AssertionError("a merged lm_head is in one of the files")


def replace_lm_head(shards: dict[str, Shard], adapter: Adapter) -> tuple[str, Stored]:
    """Put the score head where lm_head is; returns its file and its entry there."""
    tensors = {name: shard.tensors for name, shard in shards.items()}
    place, entry, values = placed_score(tensors, score_of(adapter))
    for name, shard in shards.items():
        own = entry if name == place else None
        made = with_entry(shard.header, shard.tensors, own)
        shards[name] = Shard(*made, {entry.name: values} if own else {})
    return place, entry
