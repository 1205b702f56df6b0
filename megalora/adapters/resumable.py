"""Import a PEFT adapter made elsewhere as a checkpoint, from which training resumes under any
layout."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from megalora.adapters.files import (
    INDEX,
    LORA_SECTION,
    STATE,
    STATE_JSON,
    STATE_KEYS,
    read_config,
)
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.read.stacked import ColumnOrder
from megalora.adapters.state_index import Index, Indexed, Piece, rank_file, write_index
from megalora.adapters.sums import write_sums
from megalora.adapters.trained import trained_form
from megalora.adapters.trained_on import TrainedOn, metadata_of, notes_on_base, trained_on
from megalora.adapters.write.card import coverage
from megalora.adapters.write.form import write_adapter
from megalora.atomic_folder import check_new, whole_or_gone
from megalora.digests import Digests
from megalora.hf.base_identity import base_config, weights_digest
from megalora.hf.folder import local_folder, weight_shards
from megalora.hf.json_file import read_hf_config
from megalora.lora.section import lora_section, settings
from megalora.lora.slices import Slice
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape

NOTES = 10
"""Number of notes that are shown; an adapter of thousands of linears can have as many."""


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    out: Path
    section: dict[str, Any]
    """The ``lora`` section that a config needs to train on from it."""
    num_tensors: int
    notes: list[str]
    """Lines about what was left out, filled in or could not be checked."""

    def text(self) -> str:
        """What was written and how to train on, for the user."""
        lines = [f"wrote {self.out}: {self.num_tensors} tensors", *self.notes[:NOTES]]
        if len(self.notes) > NOTES:
            lines.append(f"... and {len(self.notes) - NOTES} more notes")
        lines.append(f"to train on, give checkpoint.resume={self.out} and in the config")
        lines.append(OmegaConf.to_yaml(OmegaConf.create({"lora": self.section})).rstrip())
        return "\n".join(lines)


def import_adapter(
    source: Path, out: Path, base: str, order: ColumnOrder | None = None
) -> Imported:
    """Write the adapter folder ``source`` as a checkpoint of zero steps to ``out``, which must be
    new or empty.

    Adam's moments are zero, as at the start of a training. ``order``: how columns of stacked B's
    run, where the file does not say. Raises ``ValueError`` for what cannot be read without
    guessing, and for an adapter of a base with other sizes.
    """
    out = out.resolve()
    check_new(out, source)
    folder = local_folder(base, "--base", weights=False)
    shape = model_shape(read_hf_config(folder))
    form = trained_form(read_adapter(source, shape, order, folder, score=True), shape, fill=True)
    adapted = form.adapter.adapted
    shape = form.adapter.shape_of(shape)
    known = trained_on(source)
    tensors = form.adapter.tensors
    # What a config must say for the run to fit these tensors.
    section = lora_section(adapted, shape)
    with whole_or_gone(out) as temporary:
        write_adapter(temporary, adapted, shape, tensors, base, "per_expert", **metadata_of(known))
        (temporary / STATE).mkdir()
        # Adam begins anew: a folder of PEFT's has no moments.
        _write_fresh(temporary, tensors)
        state = {
            "step": 0, "imported_from": str(source), "base": base, "adapted": settings(adapted),
            **_beside(shape), "identity": _base_identity(folder), "sums": True,
        }  # fmt: skip
        (temporary / STATE_JSON).write_text(json.dumps(state, indent=1) + "\n")
        lora = OmegaConf.create({"lora": section})
        (temporary / LORA_SECTION).write_text(OmegaConf.to_yaml(lora))
        write_sums(temporary, {})
    notes = []
    named = read_config(source).get("base_model_name_or_path")
    # The sizes fit, or reading would have failed; whether the weights do, nobody can tell.
    if named not in (None, base):
        notes.append(f"the adapter names {named} as its base, not {base}: are they the same model?")
    notes += [
        *notes_on_base(source, folder),
        *_options_then(known),
        *coverage(adapted),
        *form.adapter.notes,
        *form.notes,
    ]
    return Imported(out, section, len(tensors), notes)


def _options_then(known: TrainedOn | None) -> list[str]:
    """A line about the options of ``model`` without which the base has other values."""
    if known is None or not known.is_rounded:
        return []
    return [
        f"the adapter was trained on a base that was {known.words()}: give these options of model"
        " to train on with the same values"
    ]


def _beside(shape: ModelShape) -> dict[str, Any]:
    """What is trained beside A and B, as state.json holds it; most adapters have none of these."""
    beside = {
        "num_scores": shape.num_scores, "saved": shape.saved, "tokens": shape.tokens,
        "biases": shape.biases,
    }  # fmt: skip
    return {key: value for key, value in beside.items() if value}


def _base_identity(folder: Path) -> dict[str, Any]:
    """Identity of the base as a run records it; without a digest of weights that are not here."""
    present = all((folder / name).is_file() for name in weight_shards(folder))
    weights = weights_digest(folder, Digests()) if present else None
    return {"config": base_config(folder), "weights": weights}


def _write_fresh(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the training state before the first step, as of one rank: float32 masters and moments
    of zero."""
    master_key, *moment_keys = STATE_KEYS
    state: dict[str, Tensor] = {}
    indexed: dict[str, Indexed] = {}
    for name, tensor in tensors.items():
        master = tensor.to(torch.float32).flatten()
        state[f"{master_key}.{name}"] = master
        for key in moment_keys:
            state[f"{key}.{name}"] = torch.zeros_like(master)
        shape = tuple(tensor.shape)
        indexed[name] = Indexed(shape, STATE_KEYS, (Piece(0, Slice.whole(shape)),))
    path = folder / STATE / rank_file(0)
    save_file(state, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    files = {path.name: (path.stat().st_size, digest)}
    write_index(folder / INDEX, Index(1, files, indexed))
