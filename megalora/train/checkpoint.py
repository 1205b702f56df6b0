"""A checkpoint is a PEFT adapter folder plus ``training_state/``; written whole or not at all.

step_000050/
  adapter_config.json  adapter_model.safetensors     loads in PEFT as it is
  probe.json              log-probabilities that a server must repeat
  training_state/
    state.json            step, config, world
    optimizer.safetensors float32 masters and Adam moments under HF names, whole tensors
    rng.safetensors       every rank's generators (dropout)
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora import host
from megalora.bridge.files import LORA_SECTION, OPTIMIZER, PROBE, RNG, STATE, STATE_JSON, STATE_KEYS
from megalora.bridge.form import write_adapter
from megalora.bridge.output import force_to_disk
from megalora.bridge.peft import gather_tensors, read_tensors
from megalora.config import RunConfig
from megalora.lora.section import differing, settings
from megalora.model.shape import read_json_object
from megalora.train.optim import load_optimizer_state, optimizer_state
from megalora.train.setup import AdaptedModel

SAME_RUN = (
    "model.path", "model.dtype", "data.train", "data.eval", "data.format", "data.max_length", "data.seed", "train.global_batch_size",
    "lora.rank", "lora.alpha", "lora.target_modules", "lora.exclude_modules", "lora.layers", "lora.rank_pattern",
    "lora.alpha_pattern", "lora.expert_rank", "lora.use_rslora",
)  # fmt: skip
"""What decides the order of samples, and what is trained on what: it must not change in the middle of a run."""


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def save_checkpoint(
    step: int, num_samples: int, config: RunConfig, model: AdaptedModel, optimizer: Any, probe: dict[str, Any]
) -> Path:
    """Write ``step_N`` into the run folder and point ``latest`` at it; collective. A failure leaves earlier ones whole.

    Args:
        num_samples: of the training data, which must not have grown when the run is resumed.
        probe: log-probabilities of the adapter as it is, for servers (``probe.py``).
    """
    parameters, pieces, groups = model.parameters, model.pieces, model.groups
    weights = gather_tensors(pieces, {p: p.data for p in parameters}, groups)
    state: dict[str, Tensor] = {}
    for key in STATE_KEYS:  # one at a time: each is as large as the adapters in float32
        values = optimizer_state(optimizer, key, parameters, groups)
        state |= {f"{key}.{name}": tensor for name, tensor in (gather_tensors(pieces, values, groups) or {}).items()}
    generators: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(generators, {name: t.cpu() for name, t in host.rng_state().items()})

    def write(folder: Path) -> None:
        assert weights is not None
        write_adapter(folder, model.adapted, model.shape, weights, config.model.path)
        (folder / PROBE).write_text(json.dumps(probe) + "\n")
        (folder / STATE).mkdir()
        save_file(state, folder / OPTIMIZER)
        rng = {f"{rank}.{name}": t for rank, states in enumerate(generators) for name, t in states.items()}
        save_file(rng, folder / RNG)
        about = {"step": step, "num_samples": num_samples, "world_size": dist.get_world_size()}
        summary = {**about, "config": asdict(config)}
        (folder / STATE_JSON).write_text(json.dumps(summary, indent=1) + "\n")

    run = Path(config.checkpoint.dir)
    target = run / checkpoint_name(step)
    _on_first_rank(
        lambda: write_atomically(target, write), f"could not save {target.name}; earlier checkpoints are whole"
    )
    _on_first_rank(
        lambda: _forget_old(target, config.checkpoint.keep),
        f"saved {target.name}, but could not remove older checkpoints",
    )
    return target


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder beside ``target``, force it to disk, then rename; ``latest`` follows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            force_to_disk(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    pointer = target.with_name(".latest.tmp")
    pointer.write_text(target.name + "\n")
    force_to_disk(pointer)
    pointer.rename(target.with_name("latest"))
    force_to_disk(target.parent)


def _on_first_rank[T](action: Callable[[], T], failure: str) -> T:
    """What ``action`` returns on rank 0, on every rank; every rank raises ``ValueError`` if it failed there."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except ValueError as error:
            answer[1] = str(error)
        except (OSError, SafetensorError) as error:
            answer[1] = f"{failure} ({error})"
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]


def _forget_old(newest: Path, keep: int) -> None:
    """Remove all but the ``keep`` latest checkpoints up to ``newest``; later ones, of an earlier run, are not ours to judge."""
    if keep:
        for folder in [f for f in sorted(newest.parent.glob("step_*")) if f.name <= newest.name][:-keep]:
            shutil.rmtree(folder)


def find_checkpoint(config: RunConfig) -> Path | None:
    """Where to resume from; None for a fresh start. The first rank decides for all: file systems may be slow to agree.

    Raises ``ValueError``, on every rank, for what is no checkpoint, and rather than mix two runs in one folder.
    """
    return _on_first_rank(
        lambda: _find_checkpoint(config), f"could not look for a checkpoint in {config.checkpoint.dir}"
    )


def _find_checkpoint(config: RunConfig) -> Path | None:
    resume, run = config.checkpoint.resume, Path(config.checkpoint.dir)
    if resume is True and not (run / "latest").is_file():
        return None
    folder = run / (run / "latest").read_text().strip() if resume is True else Path(str(resume)) if resume else None
    if folder is not None and not (folder / STATE_JSON).is_file():
        where = f"{run}/latest names {folder}, which" if resume is True else f"checkpoint.resume={resume}"
        raise ValueError(f"{where} is not a checkpoint: it has no {STATE_JSON}")
    if run.exists() and not run.is_dir():
        raise ValueError(f"checkpoint.dir={run} is a file; choose a folder")
    used = sorted(run.glob("step_*"))
    if used and (folder is None or folder.resolve().parent != run.resolve()):
        raise ValueError(
            f"checkpoint.dir={run} already holds {used[-1].name}. Set checkpoint.resume=true to continue that run, or "
            "choose another checkpoint.dir."
        )
    return folder


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
