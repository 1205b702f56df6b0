"""Restore a run from a checkpoint: adapters, optimizer, generators."""

from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megalora import host
from megalora.adapters.files import RNG, STATE_KEYS
from megalora.adapters.saved_tensors import SavedTensors, digest_fault
from megalora.adapters.state_index import Index
from megalora.adapters.training_state import SavedState
from megalora.first_rank import on_every_rank
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.magnitude import refresh_norms
from megalora.train.checkpoint.pieces import OwnedPieces
from megalora.train.optim import begin_state
from megalora.train.read_shards import read_shards


def load_checkpoint(state: SavedState, model: AdaptedModel, optimizer: Any) -> list[str]:
    """Restore adapters, optimizer and generators; returns lines for the user. Collective.

    Adapters come from the float32 masters, as after an optimizer step: the adapter files have the
    form that PEFT and servers read. Each rank reads the slices that it owns, one tensor at a time.

    Raises:
        ValueError: a file is damaged, or the state is not of this adapter.
    """
    with SavedTensors(state.folder) as saved:
        if saved.index is not None:
            _check_digests(saved, saved.index)
        # Adam's bias correction is 1 - beta**count. A merge sets the count to 0, and a bad step
        # does not raise it.
        begin_state(optimizer, state.step - state.cycle_start - state.left_out)
        _read_owned(saved, OwnedPieces(model, optimizer, replicas=True))
        read_shards(saved, STATE_KEYS[0], model.shards, model.values())
        # Norms are not saved: they follow from A and B, which have just changed.
        refresh_norms(model.chunks, model.groups)
        # An imported adapter was trained elsewhere and comes without generators.
        if state.imported_from is not None:
            return []
        return _load_generators(state, saved)


def _check_digests(saved: SavedTensors, index: Index) -> None:
    """Every file is read by one rank, which the others wait for; collective."""
    names = list(index.files)[dist.get_rank() :: dist.get_world_size()]

    def check() -> None:
        for name in names:
            if fault := digest_fault(saved.folder, index, name):
                raise ValueError(fault)

    on_every_rank(check, f"{saved.folder} cannot be read")


@torch.no_grad()
def _read_owned(saved: SavedTensors, owned: OwnedPieces) -> None:
    """Fill masters and moments."""
    for block in owned.blocks():
        place = 0
        for name, part in block.pieces:
            values = block.tensor[place : place + part.numel]
            values.copy_(saved.read(block.key, name, part))
            place += part.numel


def _load_generators(state: SavedState, saved: SavedTensors) -> list[str]:
    """Restore each rank's own generators where this run has as many ranks on the same kind of
    device; else they start from the seed. Returns lines for the user."""
    world = dist.get_world_size()
    fresh = "dropout masks are drawn anew from train.seed; without dropout nothing differs"
    if state.world_size != world:
        return [
            f"{state.folder.name} was saved by {state.world_size} ranks, this run has {world}:"
            f" {fresh}"
        ]
    rank = dist.get_rank()
    is_old = saved.index is None
    mine = _old_generators(state, rank) if is_old else saved.generators(rank)
    # Every rank has had a generator on the CPU, also one that computes on a GPU.
    if "cpu" not in mine:
        raise ValueError(f"{state.folder} is damaged: it has no generators of rank {rank}")
    if host.set_rng_state(mine):
        return []
    saved_on, run_on = ("GPUs", "the CPU") if "cuda" in mine else ("the CPU", "GPUs")
    return [f"{state.folder.name} was saved on {saved_on}, this run is on {run_on}: {fresh}"]


def _old_generators(state: SavedState, rank: int) -> dict[str, Tensor]:
    """A rank's generators in format 1, which has all ranks' in one file."""
    try:
        rng = load_file(state.folder / RNG)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{state.folder / RNG} cannot be read ({error})") from None
    prefix = f"{rank}."
    mine: dict[str, Tensor] = {}
    for name, generator_state in rng.items():
        if name.startswith(prefix):
            mine[name.removeprefix(prefix)] = generator_state
    return mine
