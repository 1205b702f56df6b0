"""Restore a run from a checkpoint: adapters, optimizer, generators."""

from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from megalora import host
from megalora.adapters.files import OPTIMIZER, RNG, STATE_KEYS
from megalora.adapters.training_state import SavedState
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.gather import read_tensors
from megalora.lora.magnitude import refresh_norms
from megalora.train.optim import load_optimizer_state


def load_checkpoint(state: SavedState, model: AdaptedModel, optimizer: Any) -> list[str]:
    """Restore adapters, optimizer and generators; returns lines for the user.

    Adapters come from the float32 masters, as after an optimizer step: the adapter files have the
    form that PEFT and servers read.
    """
    values: dict[str, dict[nn.Parameter, Tensor]] = {}
    for key in STATE_KEYS:
        values[key] = {}
        for shard in model.trained:
            values[key][shard.parameter] = torch.zeros_like(shard.parameter, dtype=torch.float32)
        read_tensors(state.folder / OPTIMIZER, model.trained, values[key], prefix=f"{key}.")
    # Every rank has read its parts of whole tensors, and takes the slices that it owns.
    load_optimizer_state(optimizer, values, state.step - state.cycle_start)
    with torch.no_grad():
        for parameter, master in values["param"].items():
            parameter.copy_(master)
        prefix = f"{STATE_KEYS[0]}."
        read_tensors(state.folder / OPTIMIZER, model.frozen, model.values(), prefix=prefix)
    refresh_norms(model.chunks, model.groups)
    # An imported adapter was trained elsewhere and comes without generators.
    if state.imported_from is not None:
        return []
    return _load_generators(state)


def _load_generators(state: SavedState) -> list[str]:
    """Restore each rank's own generators where this run has as many ranks on the same kind of
    device; else they start from the seed. Returns lines for the user."""
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
    mine: dict[str, Tensor] = {}
    for name, generator_state in rng.items():
        if name.startswith(prefix):
            mine[name.removeprefix(prefix)] = generator_state
    # Every rank has had a generator on the CPU, also one that computes on a GPU.
    if "cpu" not in mine:
        raise ValueError(
            f"{state.folder / RNG} is damaged: it has no generators of rank {dist.get_rank()}"
        )
    if host.set_rng_state(mine):
        return []
    saved_on, run_on = ("GPUs", "the CPU") if "cuda" in mine else ("the CPU", "GPUs")
    return [f"{state.folder.name} was saved on {saved_on}, this run is on {run_on}: {fresh}"]
