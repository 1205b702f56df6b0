"""Restore a run from a checkpoint: adapters, optimizer, generators."""

from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from megalora import host
from megalora.adapters.files import OPTIMIZER, RNG, STATE_KEYS
from megalora.adapters.training_state import SavedState
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.gather import read_tensors
from megalora.train.optim import load_optimizer_state


def load_checkpoint(state: SavedState, model: AdaptedModel, optimizer: Any) -> list[str]:
    """Restore adapters, optimizer and generators; returns lines for the user.

    Adapters come from the float32 masters, as after an optimizer step: the adapter files are in
    export form.
    """
    parameters = model.parameters
    values = {
        key: {p: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters}
        for key in STATE_KEYS
    }
    for key in STATE_KEYS:
        read_tensors(state.folder / OPTIMIZER, model.pieces, values[key], prefix=f"{key}.")
    load_optimizer_state(optimizer, values, state.step)
    with torch.no_grad():
        for parameter, master in values["param"].items():
            parameter.copy_(master)
    return [] if state.imported_from is not None else _load_generators(state)


def _load_generators(state: SavedState) -> list[str]:
    """Each rank's own, where this run has the same ranks on the same kind of device; else they
    start from the seed."""
    world = dist.get_world_size()
    fresh = "dropout masks are drawn anew from train.seed; without dropout nothing differs"
    if state.world_size != world:
        return [
            f"{state.folder.name} was saved by {state.world_size} ranks, this run has {world}:"
            f" {fresh}"
        ]
    prefix = f"{dist.get_rank()}."
    try:
        rng = load_file(state.folder / RNG)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{state.folder / RNG} cannot be read ({error})") from None
    mine = {name.removeprefix(prefix): t for name, t in rng.items() if name.startswith(prefix)}
    if "cpu" not in mine:
        raise ValueError(
            f"{state.folder / RNG} is damaged: it has no generators of rank {dist.get_rank()}"
        )
    if host.set_rng_state(mine):
        return []
    kinds = ("GPUs", "the CPU") if "cuda" in mine else ("the CPU", "GPUs")
    return [f"{state.folder.name} was saved on {kinds[0]}, this run is on {kinds[1]}: {fresh}"]
