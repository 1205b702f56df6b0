"""Make checkpoint folders with next to nothing in them, whole in all that is looked at before they
are loaded."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.files import CONFIG, OPTIMIZER, RNG, STATE_JSON, WEIGHTS
from megalora.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from megalora.train.checkpoint.where import Found, _find

TENSORS = (WEIGHTS, OPTIMIZER, RNG)
"""The files of a checkpoint that hold tensors."""
# Only that the sections are there is checked before two runs are compared.
SECTIONS = {"model": {}, "data": {}, "train": {}, "lora": {}}


def filled(step: int, mark: float | None = None) -> Callable[[Path], None]:
    """Writes a checkpoint of ``step`` whose tensors all hold ``mark``, which tells two saves of one
    step apart."""

    value = float(step)
    if mark is not None:
        value = mark

    def write(folder: Path) -> None:
        (folder / CONFIG).write_text("{}")
        (folder / "training_state").mkdir()
        for name in TENSORS:
            # 400 bytes: enough that a cut file loses some of them.
            save_file({"a": torch.full((100,), value)}, folder / name)
        state = {
            "step": step,
            "num_samples": 7,
            "world_size": 1,
            "saved_at": time.time(),
            "config": SECTIONS,
        }
        (folder / STATE_JSON).write_text(json.dumps(state))

    return write


def mark_of(folder: Path) -> float:
    """What all tensors of a checkpoint hold; an assertion fails where they differ, or a file cannot
    be read."""
    values = set()
    for name in TENSORS:
        values.update(load_file(folder / name)["a"].tolist())
    # Files of two saves in one folder would be a checkpoint that never was.
    assert len(values) == 1, values
    return values.pop()


def found(run: Path, resume: bool | str = True, restarted: bool = False) -> Found:
    """Where a run in this folder would begin."""
    config = RunConfig(
        model=ModelConfig(path="base"), data=DataConfig(train="data.jsonl"),
        train=TrainConfig(steps=1),
        checkpoint=CheckpointConfig(dir=str(run), resume=resume),
    )  # fmt: skip
    return _find(config, run, restarted)


def copied(run: Path, to: Path) -> Path:
    """The run folder as it was, for the next try."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
    return to
