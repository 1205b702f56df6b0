"""Report a run's progress on the first rank: a progress bar or a line per step, the run's logs, and
a loss curve as PNG."""

import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalora import host
from megalora.config import LogConfig
from megalora.json_text import parse_json
from megalora.train.expert_tokens import ExpertTokens, evenness
from megalora.train.run_logs import (
    METRICS_FILE,
    InBackground,
    JsonLines,
    RunLog,
    ShownAnswer,
    TensorBoard,
)
from megalora.train.trackers import Described, open_trackers

GIB = 2**30


class Metrics:
    """Records of one run; every method does nothing where ``active`` is False."""

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        num_steps: int,
        start_step: int,
        active: bool,
        options: Mapping[str, Any] | None = None,
        experts: ExpertTokens | None = None,
    ) -> None:
        """
        Args:
            options: the run's config by ``section.key``, for the logs that show it.
            experts: where tokens per expert are kept; None for a model without experts.
        """
        self.folder = folder
        self.config = config
        self.num_steps = num_steps
        self.start_step = start_step
        self.active = active
        self.options = options or {}
        self.experts = experts
        self.console = Console(quiet=not active, soft_wrap=True)
        # Where output goes to a file, a line per step instead.
        self.bar = active and config.progress and self.console.is_terminal
        self.progress = Progress(
            BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self.console, disable=not self.bar,
        )  # fmt: skip
        self.task = self.progress.add_task(
            "training", total=num_steps, completed=start_step, shown=""
        )
        self.logs: list[RunLog] = []
        self.last = time.perf_counter()
        self.first: tuple[int, float] | None = None
        """The first step of this process, and when it was done."""

    def open(self) -> None:
        """Open the logs; raises ``ValueError`` where one cannot be had."""
        if not self.active or self.logs:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = JsonLines(self.folder, self.start_step)
        if lines.damaged:
            self.say(
                f"{lines.path}: {lines.damaged:,} lines were not records of a step and have been"
                " removed"
            )
        self.logs.append(lines)
        if self.experts is not None:
            self.experts.open(self.start_step, self.num_steps, self.config.every)
        if self.config.tensorboard:
            self.logs.append(TensorBoard(self.folder, self.start_step))
        described = Described(self.folder, self.start_step, self.options)
        for name, tracker in open_trackers(self.config, described).items():
            self.logs.append(InBackground(tracker, name, self.say))

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(message, highlight=False, markup=False)

    def is_logged(self, step: int) -> bool:
        """Whether the numbers of a step are written down; the same on every rank."""
        return step % self.config.every == 0

    def train_step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        num_tokens: int,
        use_of_slots: Mapping[str, float],
        expert_tokens: np.ndarray | None = None,
        **others: float,
    ) -> None:
        """Report a finished step.

        Args:
            num_tokens: all tokens that it processed, filler left out.
            use_of_slots: see ``Batches.use_of_slots``; written to the files alone.
            expert_tokens: ``[layers, experts]``, see ``Run.expert_tokens``; needs ``experts``.
            others: what the objective reports beside the loss; likewise.
        """
        now = time.perf_counter()
        seconds = now - self.last
        self.last = now
        speed = num_tokens / seconds
        memory = peak_memory_bytes() / GIB
        shown = (
            f"loss {loss:.4f}  lr {lr:.2e}  |grad| {grad_norm:.3f}  {speed:,.0f} tokens/s"
            f"  {memory:.2f} GiB"
        )
        # What a run that learns from rewards is about; its loss says little.
        if "reward" in others:
            shown = f"reward {others['reward']:.4f}  {shown}"
        self.progress.update(self.task, completed=step, shown=shown)
        left = self._seconds_left(step, now, seconds)
        if self.active and self.is_logged(step):
            values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
            values["memory_gib"] = memory
            values.update(others)
            values.update(use_of_slots)
            if expert_tokens is not None and self.experts is not None:
                # Layers without experts have no tokens to count.
                counts = expert_tokens[self.experts.layers]
                values.update(evenness(counts))
                self.experts.write(step, counts)
            self._write(step, values)
            if not self.bar:
                self.say(f"step {step}/{self.num_steps}: {shown}  {as_clock(left)} left")

    def _seconds_left(self, step: int, now: float, seconds: float) -> float:
        """Time to the last step at the pace of this process so far, saves and evaluations included.

        Its first step loads and compiles what the others find there, so that it counts only while
        there is no other.
        """
        if self.first is None:
            self.first = (step, now)
            pace = seconds
        else:
            first_step, first_done = self.first
            pace = (now - first_done) / (step - first_step)
        return pace * (self.num_steps - step)

    def evaluation(
        self, step: int, loss: float, over: str, others: Mapping[str, float] | None = None
    ) -> None:
        """Report an evaluation.

        Args:
            over: what ``loss`` is a mean over, with its number.
            others: what the objective reports beside the loss.
        """
        shown = ""
        values = {"eval_loss": loss}
        for name, value in (others or {}).items():
            shown += f"  {name.replace('_', ' ')} {value:.3f}"
            values[f"eval_{name}"] = value
        self.say(f"eval loss {loss:.4f}{shown} at step {step} ({over})")
        self._write(step, values)
        self.restart_clock()

    def answers(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        """Report what the model answers to the questions of ``log.samples``."""
        for number, answer in enumerate(answers, start=1):
            # The end of a question says what is asked, the beginning of an answer what it is.
            asked = " ".join(answer.asked.split())[-80:]
            said = " ".join(answer.answer.split())[:200]
            self.say(f"answer {number} at step {step}: {asked} -> {said}")
        for log in self.logs:
            log.write_answers(step, answers)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last step, a save or an evaluation, out of the next one's
        speed."""
        self.last = time.perf_counter()

    def _write(self, step: int, values: dict[str, float]) -> None:
        for log in self.logs:
            log.write(step, values)

    def __enter__(self) -> "Metrics":
        self.open()
        self.progress.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Stop the bar, close the logs and draw the loss curve."""
        self.progress.stop()
        for log in self.logs:
            log.close(failed=error is not None)
        if self.active:
            plot_losses(self.folder)


def peak_memory_bytes() -> int:
    """Most memory that this rank has taken so far: of its GPU, or without one of the host."""
    # Linux counts a process's memory in KiB.
    return host.peak_memory_bytes() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def as_clock(seconds: float) -> str:
    """Hours, minutes and seconds: ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def plot_losses(folder: Path) -> None:
    """Draw ``loss.png`` from ``metrics.jsonl``."""
    import matplotlib

    # No screen is needed.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows: list[dict[str, Any]] = []
    for line in (folder / METRICS_FILE).read_text().splitlines():
        # A loss may be NaN, which Python writes as such.
        rows.append(parse_json(line, exact_numbers=False))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, style, label in (("loss", "-", "training"), ("eval_loss", "o", "evaluation")):
        # A record has the one or the other.
        with_key = [row for row in rows if key in row]
        if with_key:
            steps = [row["step"] for row in with_key]
            axes.plot(steps, [row[key] for row in with_key], style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per target token, or per pair)", title=str(folder))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    plt.close(figure)
