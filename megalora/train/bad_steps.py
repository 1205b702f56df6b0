"""Leave out optimizer steps whose loss or gradient is not finite, or whose loss is a spike, and
keep what was in them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalora.config import TrainConfig
from megalora.first_rank import on_first_rank
from megalora.train.run_files import BAD_STEPS
from megalora.train.spikes import LossSpikes


class BadSteps:
    """Counts the steps of this process that changed nothing; the same on every rank."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        """``folder``: the run's."""
        self.folder = folder
        self.limit = config.max_bad_steps
        self.spikes = LossSpikes(config.skip_spikes)
        self.count = 0
        self.left_out = 0
        """Bad steps since the adapter that is trained began, in earlier processes as well: Adam has
        not counted them."""

    def resume(self, losses: Sequence[float], left_out: int) -> None:
        """Go on behind these losses and so many bad steps, which a checkpoint has kept."""
        self.spikes.resume(losses)
        self.left_out = left_out

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with this mean loss may change nothing, for messages; None where it may. Call
        it once a step, with the same loss on every rank."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        return self.spikes.take(loss)

    def take(
        self, step: int, what: str, loss: float, grad_norm: float, samples: list[int],
        saved: Path | None,
    ) -> str:  # fmt: skip
        """Take note of a bad step; collective.

        Args:
            step: its number, from 1.
            what: ``fault`` of it.
            samples: numbers of the samples in its global batch, from 0.
            saved: the last checkpoint.
        Returns:
            A line for the user.
        Raises:
            ValueError: there were too many, or the file cannot be written; on every rank.
        """
        self.count += 1
        self.left_out += 1
        # JSON has no NaN.
        entry: dict[str, Any] = {
            "step": step, "loss": str(loss), "grad_norm": str(grad_norm), "samples": samples,
        }  # fmt: skip
        where = self.folder / BAD_STEPS

        def keep() -> None:
            with where.open("a") as file:
                file.write(json.dumps(entry) + "\n")

        on_first_rank(keep, f"step {step}: {what}, and {where} cannot be written")
        if self.count > self.limit:
            last = f"the last checkpoint is {saved}" if saved else "no checkpoint was saved"
            raise ValueError(
                f"step {step}: {what}. Lower train.lr or lengthen train.warmup, or"
                f" let train.max_bad_steps ({self.limit}) allow more; the step's samples are in"
                f" {where}; {last}."
            )
        return (
            f"step {step}: {what}, so it changed nothing ({self.count} of at most"
            f" {self.limit} such steps; its samples are in {where})"
        )
