"""Let the score head take lm_head's place in a merged folder: the folder of a
``...ForSequenceClassification``, which transformers loads as any other."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalora.adapters.files import STATE_JSON
from megalora.adapters.read.adapter import Adapter
from megalora.data.tokenizer import load_tokenizer
from megalora.hf.folder import INDEX
from megalora.hf.json_file import read_json_object
from megalora.hf.safetensors import Stored
from megalora.hf.tensor_names import EMBEDDING, LM_HEAD, SCORE, published_name, weight_name
from megalora.model.families import family_of

SCORE_WEIGHT = f"{SCORE}.weight"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def placed_score(shards: Mapping[str, list[Stored]], score: Tensor) -> tuple[str, Stored, Tensor]:
    """The file that gets the score head, its entry there, and its values in the base's dtype: the
    file of lm_head, or of the embedding where the two are tied."""
    at: dict[str, tuple[str, Stored]] = {}
    for name, tensors in shards.items():
        for tensor in tensors:
            at[published_name(tensor.name)] = (name, tensor)
    name, neighbour = at[LM_HEAD] if LM_HEAD in at else at[EMBEDDING]
    if neighbour.dtype not in DTYPES:
        raise ValueError(
            f"{name}: {neighbour.name} is {neighbour.dtype}; a score head is written as"
            f" {', '.join(DTYPES)}"
        )
    # Rounded once, from the dtype that the adapter was saved in.
    values = score.to(DTYPES[neighbour.dtype]).contiguous()
    num_bytes = values.numel() * values.element_size()
    shape = tuple(values.shape)
    entry = replace(neighbour, name=SCORE_WEIGHT, shape=shape, num_bytes=num_bytes)
    return name, entry, values


def with_entry(
    header: Mapping[str, Any], tensors: list[Stored], added: Stored | None
) -> tuple[dict[str, Any], list[Stored]]:
    """Header and tensors of a file without lm_head and with ``added`` at its end."""
    # Whatever lm_head is called in this folder.
    kept = [tensor for tensor in tensors if published_name(tensor.name) != LM_HEAD]
    if added is not None:
        kept.append(added)
    made: dict[str, Any] = {}
    if "__metadata__" in header:
        made["__metadata__"] = header["__metadata__"]
    # One behind the other: the format allows no gap.
    end = 0
    for tensor in kept:
        place = [end, end + tensor.num_bytes]
        made[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place,
        }  # fmt: skip
        end += tensor.num_bytes
    return made, kept


def make_classifier(folder: Path, adapter: Adapter, shard: str, added: Stored) -> None:
    """Say in a merged folder's config and index that it is a classifier of so many labels."""
    path = folder / "config.json"
    config = read_json_object(path, exact_numbers=False)
    # The number of labels is that of their names.
    names = _label_names(adapter)
    config |= {
        "architectures": [family_of(config).classifier],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    # By which transformers finds the token to score; a base often leaves it to its tokenizer.
    config["pad_token_id"] = load_tokenizer(folder, "--base").pad_token_id
    path.write_text(json.dumps(config, indent=2) + "\n")
    # A single file needs no index.
    if not (folder / INDEX).is_file():
        return
    index = read_json_object(folder / INDEX)
    # Tensor -> the file that it is in.
    places = index["weight_map"]
    for name in list(places):
        if published_name(name) == LM_HEAD:
            del places[name]
    places[SCORE_WEIGHT] = shard
    # What they count is no longer true, and nothing needs them.
    index["metadata"] = {}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _label_names(adapter: Adapter) -> list[str]:
    """The labels' names, those of transformers where a run has given none."""
    path = adapter.folder / STATE_JSON
    # An export has no state of the run.
    if path.is_file():
        options = read_json_object(path).get("config", {}).get("objective", {})
        if options.get("labels"):
            return list(options["labels"])
    return [f"LABEL_{number}" for number in range(adapter.num_scores)]


def score_of(adapter: Adapter) -> Tensor:
    """The adapter's score head, ``[C, H]``."""
    return adapter.tensors[weight_name(SCORE)]
