"""Say what a plan has to know of a teacher: its sizes, and what the head reads of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from megalora.config import ObjectiveConfig, ParallelConfig
from megalora.config.checks import require
from megalora.data.logits_header import check_k, is_logits_folder, read_header_of
from megalora.model.fields import model_shape
from megalora.model.second_model import cut_second
from megalora.model.shape import ModelShape
from megalora.planner.models import find_architecture
from megalora.planner.weights import PlannedModel


# Compared by identity: a workload is looked up often.
@dataclass(frozen=True, eq=False)
class PlannedTeacher:
    """Whose distributions a step learns, and by which distance."""

    name: str
    """What ``objective.teacher`` says."""
    shape: ModelShape | None
    """Sizes of a second model; None where the teacher is the base or a file."""
    top: int = 0
    """Tokens that a file keeps of each distribution; 0 where a model gives all of them."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    is_scaled: bool = False
    """Whether logits are divided by a temperature, which takes a copy of them."""

    @cached_property
    def model(self) -> PlannedModel | None:
        """The second model, without adapters; None where there is none."""
        return None if self.shape is None else PlannedModel(self.shape, ())

    def check(self, student: ModelShape, p: ParallelConfig) -> None:
        """Raise ``ValueError`` where it cannot teach a student that is cut as ``p`` says."""
        if self.top:
            check_k(self.top, student.vocab, p.tp)
        if self.shape is not None:
            require(
                self.shape.vocab == student.vocab,
                f"objective.teacher={self.name} has {self.shape.vocab:,} vocabulary entries and the"
                f" model {student.vocab:,}: their distributions cannot be compared",
            )
            cut_second(p, self.shape, f"objective.teacher={self.name}")


def teacher_of(objective: ObjectiveConfig) -> PlannedTeacher | None:
    """The teacher of a config, without a download; None where there is none.

    Raises:
        ValueError: it is neither known by its name nor a folder on this machine.
    """
    name = objective.teacher
    if name is None:
        return None
    shape = None
    top = 0
    if is_logits_folder(name):
        top = read_header_of(Path(name)).k
    elif name != "base":
        try:
            shape = model_shape(find_architecture(name))
        except ValueError as error:
            # The message is that of a model, which the config has two of.
            raise ValueError(str(error).replace("model.path=", "objective.teacher=")) from None
    return PlannedTeacher(name, shape, top, objective.divergence, objective.temperature != 1)
