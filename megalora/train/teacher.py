"""Bring a teacher's distributions to where the student's head reads them: those of a second frozen
model under the same layout, or of the student's base.

A pass of the teacher over a step's microbatches comes first and keeps its last hidden states of the
target tokens, ``[N, H]`` each, on the last pipeline stage. The student's pass makes the teacher's
logits of them, chunk by chunk beside its own (``model/divergence.py``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megalora.config import RunConfig
from megalora.data.batch import Batch
from megalora.data.logits_header import check_logits, is_logits_folder
from megalora.hf.folder import local_folder
from megalora.lora.switched_off import adapters_off
from megalora.model.build import build_model
from megalora.model.divergence import (
    Divergence,
    distance_from,
    distance_from_top,
)
from megalora.model.expert_load import ExpertLoad
from megalora.model.head import Outputs, last_hidden
from megalora.model.head_chunk import CHUNK_BYTES_BESIDE_TEACHER
from megalora.model.second_model import plan_second
from megalora.model.vocab_logits import Reader
from megalora.objectives.distill import DISTANCE, Distill
from megalora.objectives.objective import Objective
from megalora.parallel import Groups
from megalora.train.inputs import DeviceBatch
from megalora.train.references import set_apart
from megalora.train.schedule import Ending, Report, one, run_schedule

Readers = Callable[[DeviceBatch], Reader]


class Teacher(Protocol):
    """Whose distributions a step learns."""

    @property
    def top(self) -> int:
        """Tokens of each distribution that come with the samples; 0 where a pass makes it."""
        ...

    def readers(
        self, batches: list[Batch], inputs: list[DeviceBatch], student: "Student"
    ) -> Readers:
        """Of each microbatch, the reader of the student's distance from the teacher; collective.

        Args:
            inputs: what of ``batches`` this rank reads, on its device.
        """
        ...


@dataclass(frozen=True)
class Student:
    """The model in training, as its stepper has it."""

    chunks: list[Any]
    groups: Groups
    load: ExpertLoad


@dataclass(frozen=True)
class SecondModel:
    """A teacher of its own in memory, frozen and without adapters."""

    chunks: list[nn.Module]
    divergence: Divergence
    top = 0

    def readers(self, batches: list[Batch], inputs: list[DeviceBatch], student: Student) -> Readers:
        """As the protocol says."""
        # Its own counter: a log of experts is of the student's.
        load = ExpertLoad(self.chunks)
        found = _hidden(self.chunks, student.groups, load, batches, inputs)
        return partial(_reader, self.divergence, found)


@dataclass(frozen=True)
class OwnBase:
    """The student with its adapters switched off: no second model."""

    divergence: Divergence
    top = 0

    def readers(self, batches: list[Batch], inputs: list[DeviceBatch], student: Student) -> Readers:
        """As the protocol says."""
        with set_apart(student.chunks, student.load), adapters_off(student.chunks):
            found = _hidden(student.chunks, student.groups, student.load, batches, inputs)
        return partial(_reader, self.divergence, found)


@dataclass(frozen=True)
class FromFile:
    """A teacher that was asked before (``megalora logits``)."""

    divergence: Divergence
    top: int

    def readers(self, batches: list[Batch], inputs: list[DeviceBatch], student: Student) -> Readers:
        """As the protocol says."""
        return partial(_reader_of_file, self.divergence)


def _reader_of_file(divergence: Divergence, batch: DeviceBatch) -> Reader:
    assert batch.taught is not None, "logits were asked for"
    return distance_from_top(divergence, *batch.taught)


def _reader(divergence: Divergence, found: list[Outputs], batch: DeviceBatch) -> Reader:
    """The microbatch's own states, which stand in the order of the microbatches."""
    states = found[batch.number]
    return distance_from(divergence, states["hidden"], states["weight"])


@torch.no_grad()
def _hidden(
    chunks: list[Any],
    groups: Groups,
    load: ExpertLoad,
    batches: list[Batch],
    inputs: list[DeviceBatch],
) -> list[Outputs]:
    """What ``last_hidden`` says of each microbatch, on the last stage; an empty list elsewhere."""

    def report(outputs: Outputs, batch: DeviceBatch) -> tuple[Tensor, Tensor, Outputs]:
        return outputs["hidden"].sum(), one(), outputs

    ending = Ending(lambda _: {}, report, last_hidden)
    return run_schedule(chunks, groups, load, batches, inputs, ending, forward_only=True)


def ending_of(objective: Objective, readers: Readers | None, report: Report) -> Ending:
    """What the head of a step's own pass reads for its objective, and for its teacher where there
    is one."""
    if readers is None:
        return Ending(lambda _: objective.want, report)

    def want(batch: DeviceBatch) -> Mapping[str, Reader]:
        return {**objective.want, DISTANCE: readers(batch)}

    return Ending(want, report, chunk_bytes=CHUNK_BYTES_BESIDE_TEACHER)


def build_teacher(config: RunConfig, objective: Objective) -> Teacher | None:
    """The teacher of a run, its weights loaded; None where there is none; collective.

    Raises:
        ValueError: its vocabulary is another, or it cannot be cut as the layout says.
    """
    if not isinstance(objective, Distill):
        return None
    name = config.objective.teacher_model
    # The base is in memory already, under the adapters.
    if name is None:
        return OwnBase(objective.divergence)
    student = local_folder(config.model.path)
    # Before any weights: such a folder needs none.
    if is_logits_folder(name):
        return FromFile(objective.divergence, check_logits(config, student).k)
    folder = local_folder(name, "objective.teacher")
    shape, parallel = plan_second(config.parallel, folder, student)
    # Whatever the options say of the student's base.
    plain = replace(config.model, weight_format="plain")
    chunks = build_model(plain, parallel, shape, folder)
    for chunk in chunks:
        # Neither dropout nor balancing acts in it.
        chunk.eval()
    return SecondModel(chunks, objective.divergence)
