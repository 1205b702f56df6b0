"""Save a checkpoint: what a run needs to continue, and what PEFT and servers load."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megalora import host
from megalora.adapters.best_loss import BestLoss, Evaluations
from megalora.adapters.cycles import keep_cycles, read_cycles, state_folder, summed
from megalora.adapters.files import (
    AVERAGE,
    AVERAGED,
    OPTIMIZER,
    PROBE,
    RNG,
    START,
    STATE,
    STATE_JSON,
    STATE_KEYS,
)
from megalora.adapters.latest import BEST, checkpoints
from megalora.adapters.write.form import write_adapter
from megalora.config import CheckpointConfig, RunConfig
from megalora.first_rank import on_first_rank
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.gather import gather_tensors
from megalora.lora.section import settings
from megalora.lora.spec import has_start
from megalora.train.average import Average
from megalora.train.checkpoint.identity import Identity, Samples
from megalora.train.checkpoint.writer import (
    checkpoint_name,
    point_best,
    remove,
    write_atomically,
)
from megalora.train.optim import optimizer_state
from megalora.train.references import Start


@dataclass(frozen=True)
class Beside:
    """What a run keeps beside the adapter that it trains."""

    start: Start | None = None
    """The adapter that the run began with, where it is needed again."""
    cycles: int = 0
    """Adapters that are merged into the base; the run folder has them."""
    average: Average | None = None
    """Of the adapter."""


def save_checkpoint(
    step: int, evaluations: Evaluations, samples: Samples, identity: Identity, config: RunConfig,
    model: AdaptedModel, optimizer: Any, probe: dict[str, Any], beside: Beside | None = None,
) -> Path:  # fmt: skip
    """Write ``step_N`` into the run folder and point ``latest`` at it; collective. A failure leaves
    earlier ones whole.

    Args:
        evaluations: what is known of the run's evaluations so far.
        samples: number and digest of the training samples.
        identity: data and base, which must be the same when the run is resumed.
        probe: log-probabilities of the adapter as it is, for servers (``probe.py``).
        beside: what the run keeps beside its adapter.
    """
    run = Path(config.checkpoint.dir)
    # All collectives come before the first rank begins to write: it may fail, the others wait.
    weights = gather_tensors(model.shards, model.values(), model.groups)
    state = _whole_optimizer_state(model, optimizer)
    rng = _all_generators()
    beside = beside or Beside()
    copies = _gather_copies(beside, model)
    cycles = beside.cycles

    summary = {
        "step": step, "num_samples": samples.count, "world_size": dist.get_world_size(),
        "saved_at": time.time(),
        "evaluated_step": evaluations.last_step, "best": asdict(evaluations.best),
        "identity": identity.as_json(samples.digest), "config": asdict(config),
        "adapted": settings(model.adapted), **_of_cycles(config, cycles),
    }  # fmt: skip

    def write(folder: Path) -> None:
        # Only called on the first rank, which has the whole tensors.
        assert weights is not None
        (folder / STATE).mkdir()
        # Files for PEFT and servers first, then what only a resumed run reads.
        _write_sum(folder, run, cycles, config, model, weights)
        (folder / PROBE).write_text(json.dumps(probe) + "\n")
        save_file(state, folder / OPTIMIZER)
        save_file(rng, folder / RNG)
        for name, tensors in copies.items():
            save_file(tensors, folder / name)
        if AVERAGE in copies:
            _write_average(folder, config, model, copies[AVERAGE], weights)
        (folder / STATE_JSON).write_text(json.dumps(summary, indent=1) + "\n")

    target = run / checkpoint_name(step)
    _publish(target, write, lambda: tidy(target, evaluations.best, config.checkpoint))
    return target


def _gather_copies(beside: Beside, model: AdaptedModel) -> dict[Path, dict[str, Tensor]]:
    """File in a checkpoint -> its whole tensors, of what has the adapter's shapes; without tensors
    on other ranks than the first. Collective."""
    # Every rank enters the same collectives: what is kept follows from the config.
    copies: dict[Path, dict[str, Tensor]] = {}
    if beside.start is not None:
        copies[START] = gather_tensors(model.trained, beside.start, model.groups) or {}
    if beside.average is not None:
        values = beside.average.values
        copies[AVERAGE] = gather_tensors(model.shards, values, model.groups) or {}
    return copies


def _publish(target: Path, write: Callable[[Path], None], tidy_up: Callable[[], None]) -> None:
    """Write the checkpoint on the first rank, then look after the others; collective."""
    on_first_rank(
        lambda: write_atomically(target, write),
        f"could not save {target.name}; earlier checkpoints are whole",
    )
    # A message of its own: the new checkpoint is whole, whatever becomes of older ones.
    on_first_rank(
        tidy_up,
        f"saved {target.name}, but could not point at the best checkpoint or remove older ones",
    )


def _write_sum(
    folder: Path,
    run: Path,
    cycles: int,
    config: RunConfig,
    model: AdaptedModel,
    weights: dict[str, Tensor],
) -> None:
    """Write the adapter that fits the base as published: with those of earlier cycles added, which
    the training state keeps apart."""
    adapted = model.adapted
    if cycles:
        earlier = read_cycles(run, cycles, adapted)
        adapted, weights = summed(adapted, earlier, weights)
    write_adapter(folder, adapted, model.shape, weights, config.model.path)
    keep_cycles(run, state_folder(folder), cycles)


def _write_average(
    folder: Path,
    config: RunConfig,
    model: AdaptedModel,
    averaged: dict[str, Tensor],
    weights: dict[str, Tensor],
) -> None:
    """Write the average as an adapter of its own, in the adapter's dtype."""
    (folder / AVERAGED).mkdir()
    rounded: dict[str, Tensor] = {}
    for name, value in averaged.items():
        rounded[name] = value.to(weights[name].dtype)
    write_adapter(folder / AVERAGED, model.adapted, model.shape, rounded, config.model.path)


def _of_cycles(config: RunConfig, cycles: int) -> dict[str, int]:
    """How many adapters were merged, and at which step the current one began."""
    relora = config.train.relora
    # Without merges a run is in its first cycle to its end.
    return {"cycles": cycles, "cycle_start": cycles * relora.every if relora else 0}


def _all_generators() -> dict[str, Tensor]:
    """The state of every rank's generators by ``RANK.name``, on every rank; collective."""
    mine = {name: state.cpu() for name, state in host.rng_state().items()}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    states: dict[str, Tensor] = {}
    for rank, of_rank in enumerate(of_ranks):
        for name, state in of_rank.items():
            states[f"{rank}.{name}"] = state
    return states


def _whole_optimizer_state(model: AdaptedModel, optimizer: Any) -> dict[str, Tensor]:
    """Float32 masters and Adam's moments by ``KEY.tensor name`` on rank 0, empty elsewhere;
    collective."""
    state: dict[str, Tensor] = {}
    # One at a time, because each is as large as the adapters in float32.
    trained = model.trained
    parameters = list(dict.fromkeys(shard.parameter for shard in trained))
    for key in STATE_KEYS:
        values = optimizer_state(optimizer, key, parameters, model.groups)
        whole = gather_tensors(trained, values, model.groups) or {}
        for name, tensor in whole.items():
            state[f"{key}.{name}"] = tensor
    # What is not trained has no moments, and is its own master. All ranks have such, or none.
    if has_start(model.adapted):
        whole = gather_tensors(model.frozen, model.values(), model.groups) or {}
        for name, tensor in whole.items():
            state[f"{STATE_KEYS[0]}.{name}"] = tensor
    return state


def tidy(newest: Path, best: BestLoss, options: CheckpointConfig) -> None:
    """Let ``best`` name the checkpoint of the lowest loss, and remove those that are not kept: all
    but the ``keep`` latest ones up to ``newest``, 0 keeping all, and the best.

    Later ones are left over from before the run went back, and stay until their steps are saved
    again.
    """
    # First: until it names another one, the one before is kept.
    kept_for_loss = point_best(newest.parent, best, options.keep_best)
    if options.keep:
        there = checkpoints(newest.parent)
        up_to_newest = there[: there.index(newest) + 1]
        for folder in up_to_newest[: -options.keep]:
            if not (kept_for_loss and folder.name == checkpoint_name(best.step)):
                remove(folder)


def restore_best(config: RunConfig, best: BestLoss) -> list[str]:
    """Let ``best`` name what it must where the run begins: after it has gone back, or was killed
    before it could; returns lines for the user. Collective."""
    folder = Path(config.checkpoint.dir)
    keep = config.checkpoint.keep_best
    names_one = on_first_rank(
        lambda: point_best(folder, best, keep), f"{folder / BEST} cannot be written"
    )
    if not keep or names_one or best.loss is None:
        return []
    return [
        f"checkpoint.keep_best: {best.words()}, whose checkpoint is not in {folder}; {BEST} comes"
        " with the next lower one"
    ]
