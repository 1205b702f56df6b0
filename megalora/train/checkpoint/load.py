"""Restore a run from a checkpoint: adapters, optimizer, generators; refuse another run's."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megalora import host
from megalora.bridge.files import LORA_SECTION, OPTIMIZER, RNG, STATE_JSON, STATE_KEYS
from megalora.bridge.peft import read_tensors
from megalora.config import RunConfig
from megalora.lora.section import differing, settings
from megalora.model.shape import read_json_object
from megalora.train.optim import load_optimizer_state
from megalora.train.setup import AdaptedModel

SAME_RUN = (
    "model.path", "model.dtype", "data.train", "data.eval", "data.format", "data.max_length", "data.seed", "train.global_batch_size",
    "lora.rank", "lora.alpha", "lora.target_modules", "lora.exclude_modules", "lora.layers", "lora.rank_pattern",
    "lora.alpha_pattern", "lora.expert_rank", "lora.use_rslora",
)  # fmt: skip
"""What decides the order of samples, and what is trained on what: it must not change in the middle of a run."""


def load_checkpoint(folder: Path, num_samples: int, config: RunConfig, model: AdaptedModel, optimizer: Any) -> int:
    """Restore adapters, optimizer and generators; returns the number of finished steps.

    Adapters come from the float32 masters, as after an optimizer step: the adapter files are in export form.
    """
    state = read_json_object(folder / STATE_JSON)
    if "imported_from" in state:
        _check_same_adapters(folder, state, config, model)
    else:
        _check_same_run(folder, state, config, num_samples)
    parameters = model.parameters
    values = {
        key: {p: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters} for key in STATE_KEYS
    }
    for key in STATE_KEYS:
        read_tensors(folder / OPTIMIZER, model.pieces, values[key], prefix=f"{key}.")
    load_optimizer_state(optimizer, values, state["step"])
    with torch.no_grad():
        for parameter, master in values["param"].items():
            parameter.copy_(master)
    if state.get("world_size") == dist.get_world_size():
        rng, rank = load_file(folder / RNG), f"{dist.get_rank()}."
        host.set_rng_state({name.removeprefix(rank): t for name, t in rng.items() if name.startswith(rank)})
    return state["step"]


def _check_same_run(folder: Path, state: dict[str, Any], config: RunConfig, num_samples: int) -> None:
    before, now = state["config"], asdict(config)
    for name in SAME_RUN:
        section, key = name.split(".")
        if before[section][key] != now[section][key]:
            raise ValueError(
                f"{folder} was trained with {name}={before[section][key]}, this run has {now[section][key]}. Use the same value, "
                "or start a new run in another checkpoint.dir."
            )
    if state["num_samples"] != num_samples:
        raise ValueError(
            f"{folder} was trained on {state['num_samples']:,} samples of {config.data.train}, which now has {num_samples:,}: "
            "samples would be repeated or skipped. Restore the data, or start a new run in another checkpoint.dir."
        )


def _check_same_adapters(folder: Path, imported: dict[str, Any], config: RunConfig, model: AdaptedModel) -> None:
    """An import knows its base and what it adapts; all else may be chosen."""
    if not _same_place(imported["base"], config.model.path):
        raise ValueError(
            f"{folder} was imported for the base {imported['base']}, this run has model.path={config.model.path}. Import it for this one"
        )
    if apart := differing(settings(model.adapted), imported["adapted"]):
        raise ValueError(
            f"{folder} holds other adapters than this config's lora section describes: {len(apart)} modules differ in presence, "
            f"rank or scale, such as {apart[0]}. Use the section in {folder / LORA_SECTION}"
        )


def _same_place(one: str, other: str) -> bool:
    """The same hub name, or the same folder however it is written."""
    return one == other or Path(one).resolve() == Path(other).resolve()
