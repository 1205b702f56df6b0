"""Time the passes that come before a step's own: those of references and of a teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megalora.bench.timers import Timeline
from megalora.data.batch import Batch
from megalora.train.inputs import DeviceBatch
from megalora.train.step import Stepper
from megalora.train.teacher import Readers, Student, Teacher

PART = "reference"
"""The part that all of such a pass counts as, its bubble included, as the planner counts it."""


@dataclass(frozen=True)
class _Timed:
    """A teacher whose pass is timed."""

    teacher: Teacher
    timeline: Timeline

    @property
    def top(self) -> int:
        """As the protocol says."""
        return self.teacher.top

    def readers(self, batches: list[Batch], inputs: list[DeviceBatch], student: Student) -> Readers:
        """As the protocol says."""
        with self.timeline.whole(PART):
            return self.teacher.readers(batches, inputs, student)


def watch_passes_before(stepper: Stepper, timeline: Timeline) -> None:
    """Time them from now on. Layers of the model run in them too, whose hooks would count them as
    parts of the step's own pass."""
    if stepper.teacher is not None:
        stepper.teacher = _Timed(stepper.teacher, timeline)
    # Without references the method has nothing to do, and takes no time.
    if stepper.objective.references:
        stepper.find_references = _timed(stepper.find_references, timeline)


def _timed(method: Callable[..., Any], timeline: Timeline) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        with timeline.whole(PART):
            return method(*args)

    return timed
