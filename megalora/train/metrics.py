"""Report a run's progress on the first rank: a progress bar, metrics.jsonl, TensorBoard, and a loss
curve as PNG."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalora.config import LogConfig


class Metrics:
    """Records of one run; every method does nothing where ``active`` is False."""

    def __init__(
        self, folder: Path, config: LogConfig, num_steps: int, start_step: int, active: bool
    ) -> None:
        self.folder = folder
        self.config = config
        self.active = active
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
        self.writer: Any = None
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            damaged = _forget_after(folder / "metrics.jsonl", start_step)
            if damaged:
                self.say(
                    f"{folder}/metrics.jsonl: {damaged:,} lines were not records of a step and"
                    " have been removed"
                )
            self.file = (folder / "metrics.jsonl").open("a")
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # purge_step hides the points that a resumed run writes again.
                self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self.last = time.perf_counter()

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(message, highlight=False, markup=False)

    def train_step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        num_tokens: int,
        use_of_slots: Mapping[str, float],
        **others: float,
    ) -> None:
        """Report a finished step.

        Args:
            num_tokens: all tokens that it processed, filler left out.
            use_of_slots: see ``Batches.use_of_slots``; written to the files alone.
            others: what the objective reports beside the loss; likewise.
        """
        now = time.perf_counter()
        speed = num_tokens / (now - self.last)
        self.last = now
        shown = f"loss {loss:.4f}  lr {lr:.2e}  |grad| {grad_norm:.3f}  {speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, shown=shown)
        if step % self.config.every == 0:
            values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
            values.update(others)
            values.update(use_of_slots)
            self._write(step, values)
            if not self.bar:
                self.say(f"step {step}: {shown}")

    def evaluation(self, step: int, loss: float, num_tokens: int) -> None:
        """Report an evaluation; ``loss`` is the mean over its target tokens."""
        self.say(f"eval loss {loss:.4f} at step {step} ({num_tokens:,} target tokens)")
        self._write(step, {"eval_loss": loss})
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last step, a save or an evaluation, out of the next one's
        speed."""
        self.last = time.perf_counter()

    def _write(self, step: int, values: dict[str, float]) -> None:
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        # Whoever follows the file sees each step when it is done.
        self.file.flush()
        for name, value in values.items():
            if self.writer:
                self.writer.add_scalar(name, value, step)

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bar, flush everything and draw the loss curve."""
        self.progress.stop()
        if not self.active:
            return
        self.file.close()
        if self.writer:
            self.writer.close()
        plot_losses(self.folder)


def _forget_after(path: Path, step: int) -> int:
    """Remove the lines of steps that a resumed run will do again, and a last line that a killed run
    left half written.

    Returns how many other lines were not records of a step, and so were removed too.
    """
    if not path.is_file():
        return 0
    kept: list[str] = []
    damaged = 0
    # A run that starts from step 0 keeps nothing of what was there before.
    lines = path.read_bytes().decode(errors="replace").splitlines() if step else []
    for number, line in enumerate(lines, start=1):
        found = _step_of(line)
        if found is not None and found <= step:
            kept.append(line + "\n")
        # A last line that a kill cut short is expected.
        elif found is None and number < len(lines):
            damaged += 1
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    # In one move: a kill meanwhile must not lose them all.
    temporary.replace(path)
    return damaged


def _step_of(line: str) -> int | None:
    """The step of a record; None for what is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step")
    # True is an int to isinstance.
    return step if type(step) is int else None


def plot_losses(folder: Path) -> None:
    """Draw ``loss.png`` from ``metrics.jsonl``."""
    import matplotlib

    # No screen is needed.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, style, label in (("loss", "-", "training"), ("eval_loss", "o", "evaluation")):
        # A record has the one or the other.
        with_key = [row for row in rows if key in row]
        if with_key:
            steps = [row["step"] for row in with_key]
            axes.plot(steps, [row[key] for row in with_key], style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per target token)", title=str(folder))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    plt.close(figure)
