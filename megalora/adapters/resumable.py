"""A PEFT adapter made elsewhere as a checkpoint: training resumes from it, under any layout."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from megalora.adapters.files import (
    LORA_SECTION,
    OPTIMIZER,
    STATE,
    STATE_JSON,
    STATE_KEYS,
    read_config,
)
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.read.stacked import ColumnOrder
from megalora.adapters.trained import trained_form
from megalora.adapters.write.card import coverage
from megalora.adapters.write.form import write_adapter
from megalora.atomic_folder import check_new, whole_or_gone
from megalora.digests import Digests
from megalora.hf.base_identity import base_config, weights_digest
from megalora.hf.folder import local_folder, weight_shards
from megalora.hf.json_file import read_hf_config
from megalora.lora.section import lora_section, settings
from megalora.model.fields import model_shape


@dataclass(frozen=True)
class Imported:
    """What was written, and what a config must say to train on from it."""

    out: Path
    section: dict[str, Any]
    num_tensors: int
    notes: list[str]

    def text(self) -> str:
        lora = OmegaConf.to_yaml(OmegaConf.create({"lora": self.section})).rstrip()
        lines = [f"wrote {self.out}: {self.num_tensors} tensors", *self.notes[:10]]
        lines += [f"... and {len(self.notes) - 10} more notes"] if len(self.notes) > 10 else []
        return "\n".join(
            [*lines, f"to train on, give checkpoint.resume={self.out} and in the config", lora]
        )


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
    form = trained_form(read_adapter(source, shape, order, folder), shape, fill=True)
    adapted = form.adapter.adapted
    tensors = form.adapter.tensors
    section = lora_section(adapted, shape)
    with whole_or_gone(out) as temporary:
        write_adapter(temporary, adapted, shape, tensors, base)
        (temporary / STATE).mkdir()
        save_file(_fresh_state(tensors), temporary / OPTIMIZER)
        state = {
            "step": 0,
            "imported_from": str(source),
            "base": base,
            "adapted": settings(adapted),
        }
        state["identity"] = _base_identity(folder)
        (temporary / STATE_JSON).write_text(json.dumps(state, indent=1) + "\n")
        (temporary / LORA_SECTION).write_text(
            OmegaConf.to_yaml(OmegaConf.create({"lora": section}))
        )
    named = read_config(source).get("base_model_name_or_path")
    notes = (
        [f"the adapter names {named} as its base, not {base}: are they the same model?"]
        if named not in (None, base)
        else []
    )
    return Imported(
        out, section, len(tensors), [*notes, *coverage(adapted), *form.adapter.notes, *form.notes]
    )


def _base_identity(folder: Path) -> dict[str, Any]:
    """Of the base, as a run says it; without a digest of weights that are not here."""
    present = all((folder / name).is_file() for name in weight_shards(folder))
    weights = weights_digest(folder, Digests()) if present else None
    return {"config": base_config(folder), "weights": weights}


def _fresh_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    masters = {name: t.to(torch.float32) for name, t in tensors.items()}
    keys = STATE_KEYS[1:]
    return {f"{STATE_KEYS[0]}.{n}": t for n, t in masters.items()} | {
        f"{key}.{n}": torch.zeros_like(t) for key in keys for n, t in masters.items()
    }
