"""Save what a run needs to go on, and what PEFT and servers load."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megalora import host
from megalora.adapters.files import OPTIMIZER, PROBE, RNG, STATE, STATE_JSON, STATE_KEYS
from megalora.adapters.write.form import write_adapter
from megalora.config import RunConfig
from megalora.first_rank import on_first_rank
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.gather import gather_tensors
from megalora.lora.section import settings
from megalora.train.checkpoint.identity import Identity, Samples
from megalora.train.checkpoint.writer import checkpoint_name, checkpoints, remove, write_atomically
from megalora.train.optim import optimizer_state


def save_checkpoint(
    step: int, samples: Samples, identity: Identity, config: RunConfig, model: AdaptedModel,
    optimizer: Any,
    probe: dict[str, Any],
) -> Path:  # fmt: skip
    """Write ``step_N`` into the run folder and point ``latest`` at it; collective. A failure leaves
    earlier ones whole.

    Args:
        samples, identity: what is trained on what, which must be the same when the run is resumed.
        probe: log-probabilities of the adapter as it is, for servers (``probe.py``).
    """
    weights = gather_tensors(model.pieces, {p: p.data for p in model.parameters}, model.groups)
    state = _whole_optimizer_state(model, optimizer)
    generators: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(generators, {name: t.cpu() for name, t in host.rng_state().items()})

    def write(folder: Path) -> None:
        assert weights is not None
        write_adapter(folder, model.adapted, model.shape, weights, config.model.path)
        (folder / PROBE).write_text(json.dumps(probe) + "\n")
        (folder / STATE).mkdir()
        save_file(state, folder / OPTIMIZER)
        rng = {
            f"{rank}.{name}": t
            for rank, states in enumerate(generators)
            for name, t in states.items()
        }
        save_file(rng, folder / RNG)
        summary = {
            "step": step, "num_samples": samples.count, "world_size": dist.get_world_size(),
            "saved_at": time.time(),
            "identity": identity.as_json(samples.digest), "config": asdict(config),
            "adapted": settings(model.adapted),
        }  # fmt: skip
        (folder / STATE_JSON).write_text(json.dumps(summary, indent=1) + "\n")

    target = Path(config.checkpoint.dir) / checkpoint_name(step)
    on_first_rank(
        lambda: write_atomically(target, write),
        f"could not save {target.name}; earlier checkpoints are whole",
    )
    on_first_rank(
        lambda: _forget_old(target, config.checkpoint.keep),
        f"saved {target.name}, but could not remove older checkpoints",
    )
    return target


def _whole_optimizer_state(model: AdaptedModel, optimizer: Any) -> dict[str, Tensor]:
    """Float32 masters and Adam's moments by ``KEY.tensor name`` on rank 0, empty elsewhere;
    collective."""
    state: dict[str, Tensor] = {}
    for key in STATE_KEYS:  # one at a time: each is as large as the adapters in float32
        values = optimizer_state(optimizer, key, model.parameters, model.groups)
        whole = gather_tensors(model.pieces, values, model.groups) or {}
        state |= {f"{key}.{name}": tensor for name, tensor in whole.items()}
    return state


def _forget_old(newest: Path, keep: int) -> None:
    """Remove all but the ``keep`` latest checkpoints up to ``newest``; later ones, of an earlier
    run, are not ours to judge."""
    if keep:
        there = checkpoints(newest.parent)
        for folder in there[: there.index(newest) + 1][:-keep]:
            remove(folder)
