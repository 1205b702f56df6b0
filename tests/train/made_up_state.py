"""Save made-up adapters of a model that is not there, with a run's own writer: what a distributed
optimizer would hand it, at any size."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.train_case import QWEN3_30B_A3B, TINY_MODEL
from megalora.adapters.best_loss import Evaluations
from megalora.adapters.files import STATE_KEYS
from megalora.config import (
    CheckpointConfig,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megalora.lora.select import resolve
from megalora.lora.slices import Slice
from megalora.lora.spec import Adapted, expected_tensors
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.train.checkpoint.identity import Identity, Samples
from megalora.train.checkpoint.pieces import Block
from megalora.train.checkpoint.save import CheckpointWriter, Texts


@dataclass(frozen=True)
class Described:
    """Sizes and adapters of a model."""

    shape: ModelShape
    adapted: list[Adapted]

    @property
    def num_elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in expected_tensors(self.adapted).values())


def described(layers: int, rank: int = 16, *, tiny: bool = False) -> Described:
    """Qwen3-30B-A3B with so many layers, or a tiny one, and adapters on all linears."""
    base = TINY_MODEL if tiny else QWEN3_30B_A3B
    shape = model_shape({**base, "num_hidden_layers": layers})
    return Described(shape, resolve(LoRAConfig(rank=rank, alpha=2.0 * rank), shape))


class MadeUpPieces:
    """What one of ``world`` ranks owns: an equal run of the elements of all tensors in a row."""

    def __init__(self, model: Described, rank: int, world: int) -> None:
        begin = model.num_elements * rank // world
        end = model.num_elements * (rank + 1) // world
        self.pieces: list[tuple[str, Slice]] = []
        place = 0
        for name, shape in expected_tensors(model.adapted).items():
            whole = Slice.whole(shape)
            first = max(begin, place)
            last = min(end, place + whole.numel)
            if first < last:
                self.pieces.append((name, whole.part(first - place, last - place)))
            place += whole.numel
        self.dtypes: dict[str, Any] = dict.fromkeys((n for n, _ in self.pieces), torch.bfloat16)
        generator = torch.Generator().manual_seed(rank)
        self.values = {key: torch.randn(end - begin, generator=generator) for key in STATE_KEYS}

    def blocks(
        self, start: Mapping[Any, Any] | None = None, average: Mapping[Any, Any] | None = None
    ) -> Iterator[Block]:
        """One for each key."""
        for key, values in self.values.items():
            yield Block(key, values, tuple(self.pieces))


def writer_of(
    run: Path, model: Described, pieces: MadeUpPieces, group: dist.ProcessGroup | None, keep: int
) -> CheckpointWriter:
    """The writer of a run that keeps so many checkpoints."""
    config = RunConfig(
        model=ModelConfig(path="base"), data=DataConfig(train="data.jsonl"),
        train=TrainConfig(steps=1), checkpoint=CheckpointConfig(dir=str(run), keep=keep),
    )  # fmt: skip
    return CheckpointWriter(config, model, pieces, group)


def texts_of(writer: CheckpointWriter, step: int) -> Texts:
    """What is written beside tensors."""
    identity = Identity("train", None, {}, "weights")
    return writer.texts(step, Evaluations(), Samples(1, "samples"), identity, {}, cycles=0)
