"""Make checkpoint folders with next to nothing in them, whole in all that is looked at before they
are loaded."""

import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from megalora.adapters.files import CONFIG, INDEX, STATE, STATE_JSON, STATE_KEYS, WEIGHTS
from megalora.adapters.saved_tensors import SavedTensors, digest_fault
from megalora.adapters.state_index import Index, Indexed, Piece, rank_file, write_index
from megalora.adapters.write.stream import write_tensors
from megalora.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from megalora.lora.slices import Slice
from megalora.train.checkpoint.pieces import Block
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.checkpoint.where import Found, _find
from megalora.train.checkpoint.writer import write_together

# Only that the sections are there is checked before two runs are compared.
SECTIONS = {"model": {}, "data": {}, "train": {}, "lora": {}}


def save_filled(target: Path, mark: float | None = None) -> None:
    """Save a checkpoint, as a run of one rank does, whose tensors all hold ``mark``, which tells
    two saves of one step apart; by default the step."""
    step = int(target.name.removeprefix("step_"))
    # 400 bytes: enough that a cut file loses some of them.
    values = torch.full((100,), float(step) if mark is None else mark)
    piece = Slice.whole((100,))
    snapshot = Snapshot()
    blocks = [Block(key, values, (("a", piece),)) for key in STATE_KEYS]
    snapshot.take(blocks, {"cpu": torch.zeros(16, dtype=torch.uint8)})

    def own(folder: Path) -> tuple[int, str]:
        (folder / STATE).mkdir()
        return snapshot.write(folder / STATE / rank_file(0))

    def rest(folder: Path, made: list[tuple[int, str]]) -> None:
        write_tensors(folder / WEIGHTS, {"a": values}, [("a", values)], {"format": "pt"})
        (folder / CONFIG).write_text("{}")
        tensors = {"a": Indexed((100,), STATE_KEYS, (Piece(0, piece),))}
        write_index(folder / INDEX, Index(1, {rank_file(0): made[0]}, tensors))
        state = {
            "step": step,
            "num_samples": 7,
            "world_size": 1,
            "saved_at": time.time(),
            "config": SECTIONS,
        }
        (folder / STATE_JSON).write_text(json.dumps(state))

    write_together(target, own, rest)


def mark_of(folder: Path) -> float:
    """What all tensors of a checkpoint hold; an assertion fails where they differ, or a file cannot
    be read."""
    values = set(load_file(folder / WEIGHTS)["a"].tolist())
    with SavedTensors(folder) as saved:
        assert saved.index is not None
        assert digest_fault(folder, saved.index, rank_file(0)) is None
        for key in STATE_KEYS:
            values.update(saved.whole(key, "a", (100,)).tolist())
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
