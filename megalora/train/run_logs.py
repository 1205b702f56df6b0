"""Where the numbers of a run go: one interface, and the logs that every run may have.

A log takes records of numbers by step and is closed once. ``trackers.py`` has those that need a
package of their own.
"""

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megalora.json_text import parse_json

METRICS_FILE = "metrics.jsonl"
"""File in the run folder with one record a line."""
ANSWERS_FILE = "answers.jsonl"
"""File in the run folder with the answers of one evaluation a line (``log.samples``)."""
CLOSING_S = 60.0
"""How long the end of a run waits for a log that sends its records over a network."""


@dataclass(frozen=True)
class ShownAnswer:
    """What the model answers to one of the questions of ``log.samples``."""

    asked: str
    expected: str
    """The answer in the data; empty where there is none."""
    answer: str
    tokens: list[int]
    """The token that ended the answer included."""
    ended: bool
    """Whether the model ended it; otherwise it was cut at ``log.sample_tokens``."""


class RunLog(Protocol):
    """Takes numbers and answers of one run, on its first rank."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` by name, as they are after ``step`` finished steps."""
        ...

    def write_answers(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        """Record answers by the model as it is after ``step`` finished steps."""
        ...

    def close(self, failed: bool) -> None:
        """Bring everything to where it belongs; ``failed``: the run ended with an error."""
        ...


class JsonLines:
    """``metrics.jsonl`` and ``answers.jsonl``: one JSON object a line, each there as soon as its
    step is done."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self.path = folder / METRICS_FILE
        self.damaged = forget_after(self.path, start_step)
        """Number of lines that were not records of a step, and have been removed."""
        self.file = self.path.open("a")
        self.answers = folder / ANSWERS_FILE
        forget_after(self.answers, start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        # Whoever follows the file sees each step when it is done.
        self.file.flush()

    def write_answers(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        record = {"step": step, "answers": [asdict(answer) for answer in answers]}
        # Opened only now: most runs have none.
        with self.answers.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def close(self, failed: bool) -> None:
        self.file.close()


class TensorBoard:
    """Event files in ``tensorboard/``."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides the points that a resumed run writes again.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def write_answers(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        for number, answer in enumerate(answers, start=1):
            # Markdown, in which an indented line is shown as it is.
            lines = [f"    {line}" for line in as_text(answer).splitlines()]
            self.writer.add_text(f"answer {number}", "\n".join(lines), step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class InBackground:
    """Passes records on to a log from a thread of its own: a slow network must not hold up a step.

    The log's first error is said in a line and ends that log, not the run.
    """

    def __init__(self, log: RunLog, name: str, say: Callable[[str], None]) -> None:
        self.log = log
        self.name = name
        self.say = say
        self.failure: Exception | None = None
        self.has_said = False
        self.records: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: an interpreter that has to end does not wait for a server that hangs.
        self.thread = threading.Thread(target=self._pass_on, name=f"log.{name}", daemon=True)
        self.thread.start()

    def _pass_on(self) -> None:
        """Run in the thread until ``close`` puts None behind the last record."""
        while (record := self.records.get()) is not None:
            # After an error records are taken off the queue all the same, or it would grow.
            if self.failure is None:
                try:
                    record()
                except Exception as error:
                    self.failure = error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._put(partial(self.log.write, step, dict(values)))

    def write_answers(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        self._put(partial(self.log.write_answers, step, list(answers)))

    def _put(self, record: Callable[[], None]) -> None:
        self._say_failure()
        if self.failure is None:
            self.records.put(record)

    def close(self, failed: bool) -> None:
        self.records.put(None)
        self.thread.join(CLOSING_S)
        if self.thread.is_alive():
            self.say(
                f"log.{self.name}: not everything was sent within {CLOSING_S:.0f} s; the rest is"
                f" in {METRICS_FILE} alone"
            )
            return
        try:
            self.log.close(failed)
        except Exception as error:
            self.failure = self.failure or error
        self._say_failure()

    def _say_failure(self) -> None:
        if self.failure is not None and not self.has_said:
            self.has_said = True
            self.say(
                f"log.{self.name}: {one_line(self.failure)}. The run goes on without this log;"
                f" {METRICS_FILE} has every record."
            )


def as_text(answer: ShownAnswer) -> str:
    """Question, expected answer and the model's, each below the other."""
    parts = [f"asked:    {answer.asked}"]
    if answer.expected:
        parts.append(f"expected: {answer.expected}")
    return "\n".join([*parts, f"answer:   {answer.answer}"])


def one_line(error: Exception) -> str:
    """The text of an error in one line without a full stop, its type where it has none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def forget_after(path: Path, step: int) -> int:
    """Remove the lines of steps that a resumed run will do again, and a last line that a killed run
    left half written.

    Returns how many other lines were not records of a step, and so were removed too.
    """
    # A run that starts from step 0 keeps nothing of what was there before.
    _, damaged = keep_records(path, lambda record: step > 0 and record["step"] <= step)
    return damaged if step else 0


def keep_records(
    path: Path, is_kept: Callable[[dict[str, Any]], bool]
) -> tuple[list[dict[str, Any]], int]:
    """Remove all lines of a file of records but those of ``is_kept``.

    Returns:
        The records that are kept, and how many lines were none, but for a last one that a killed
        run left half written.
    """
    if not path.is_file():
        return [], 0
    kept: list[dict[str, Any]] = []
    text: list[str] = []
    damaged = 0
    lines = path.read_bytes().decode(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        record = record_of(line)
        if record is not None and is_kept(record):
            kept.append(record)
            text.append(line + "\n")
        # A last line that a kill cut short is expected.
        elif record is None and number < len(lines):
            damaged += 1
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(text))
    # In one move: a kill meanwhile must not lose them all.
    temporary.replace(path)
    return kept, damaged


def record_of(line: str) -> dict[str, Any] | None:
    """A line of such a file; None for what is not a record of a step."""
    try:
        # A loss may be NaN, which Python writes as such.
        record = parse_json(line, exact_numbers=False)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    # True is an int to isinstance.
    return record if type(record.get("step")) is int else None
