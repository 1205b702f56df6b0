"""What a run with periodic merges (ReLoRA) has merged so far: the adapters of its earlier cycles,
kept exactly, and their sum with the current one.

The sum of adapters of one linear is one adapter: A's one below the other, B's side by side, with
the scale of each.

    s B_1 A_1 + s B_2 A_2 = s [B_1 B_2] [A_1; A_2]        rank r_1 + r_2

A checkpoint's adapter is that sum, so that it fits the base as published, in PEFT and in servers;
its training state holds the current adapter alone, and the earlier ones in files of their own.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megalora.adapters.as_plain import Get
from megalora.adapters.files import STATE
from megalora.adapters.write.stream import write_tensors
from megalora.atomic_folder import force_to_disk
from megalora.lora.spec import Adapted, expected_tensors

FOLDER = "cycles"
"""Folder of these files, in a run folder and in a checkpoint's training state."""
type Factors = Mapping[str, Tensor]


def cycle_file(folder: Path, number: int) -> Path:
    """The file of a cycle, counted from 0, below a run folder or a training state."""
    return folder / FOLDER / f"cycle_{number:06d}.safetensors"


def save_cycle(
    run: Path,
    number: int,
    announced: Mapping[str, Tensor],
    factors: Iterable[tuple[str, Tensor]],
) -> None:
    """Keep the adapter of a cycle that is merged, in the run folder; whole or not at all.

    Args:
        announced: all tensors of it, by name; only shapes and dtypes are read.
        factors: (name, tensor) of each, made while the file is written.
    """
    target = cycle_file(run, number)
    target.parent.mkdir(exist_ok=True)
    # A name of its own until it is whole: a run that is killed must not find half a cycle.
    temporary = target.with_suffix(".tmp")
    try:
        write_tensors(temporary, announced, factors, {"format": "pt"})
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    force_to_disk(target.parent)
    # The folder of cycles may be new.
    force_to_disk(run)


def keep_cycles(source: Path, target: Path, count: int) -> None:
    """Let ``target`` have the files of the first ``count`` cycles of ``source``; both are folders
    that ``cycle_file`` takes."""
    if not count:
        return
    (target / FOLDER).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        there = cycle_file(source, number)
        here = cycle_file(target, number)
        # Resuming in the folder where it began, the run has them already.
        if here.exists() and here.samefile(there):
            continue
        # Of another attempt, which went on from an earlier checkpoint.
        here.unlink(missing_ok=True)
        try:
            # The files never change: a second name takes no room.
            os.link(there, here)
        except OSError:
            # Another file system, or one without links.
            shutil.copyfile(there, here)


def read_cycles(folder: Path, count: int, adapted: Sequence[Adapted]) -> list[dict[str, Tensor]]:
    """The factors of the first ``count`` cycles.

    Args:
        folder: a run folder or a checkpoint's training state.
        adapted: what every cycle trained.
    Raises:
        ValueError: a file is missing, damaged, or not of these adapters.
    """
    shapes = expected_tensors(list(adapted))
    found: list[dict[str, Tensor]] = []
    for number in range(count):
        path = cycle_file(folder, number)
        try:
            factors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
        # Names too: a linear more or less would be merged, or left out, in silence.
        if {name: tuple(value.shape) for name, value in factors.items()} != shapes:
            raise ValueError(f"{path} holds other adapters than the run has")
        found.append(factors)
    return found


def state_folder(checkpoint: Path) -> Path:
    """Where a checkpoint has its cycles, for ``cycle_file``."""
    return checkpoint / STATE


def summed_source(
    adapted: Sequence[Adapted], cycles: Sequence[Get], current: Get
) -> tuple[list[Adapted], Get]:
    """The sum of the cycles' adapters and the current one, as one adapter of the sum of their
    ranks, and a function that returns its tensors, each made when it is asked for.

    Args:
        adapted: what every cycle trained.
        cycles: return the factors of earlier cycles, whole, by tensor name.
        current: likewise; its dtype is the sum's.
    """
    whole: list[Adapted] = []
    for a in adapted:
        rank = a.rank * (len(cycles) + 1)
        # The scale is that of each part, so that alpha grows with the rank.
        whole.append(replace(a, rank=rank, alpha=a.scale * rank))

    def get(name: str) -> Tensor:
        value = current(name)
        of_parts = [part(name).to(value) for part in cycles]
        # Ranks are A's rows and B's columns.
        return torch.cat([*of_parts, value], dim=0 if ".lora_A." in name else 1)

    return whole, get


def summed(
    adapted: Sequence[Adapted], cycles: Sequence[Factors], current: Factors
) -> tuple[list[Adapted], dict[str, Tensor]]:
    """``summed_source`` of tensors in memory."""
    whole, get = summed_source(adapted, [part.__getitem__ for part in cycles], current.__getitem__)
    # Experts are tensors of their own, each with its own A and B to put together.
    return whole, {name: get(name) for name in current}
