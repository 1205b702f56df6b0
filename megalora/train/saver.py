"""Save the checkpoints of a run, and remember how far it has come."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megalora.adapters.best_loss import BestLoss, Evaluations
from megalora.train.assemble import Run
from megalora.train.average import Average
from megalora.train.checkpoint.identity import Identity, Samples
from megalora.train.checkpoint.save import Beside, save_checkpoint
from megalora.train.drift import DriftCheck
from megalora.train.probe import Probe
from megalora.train.relora import Cycles


@dataclass
class Progress:
    """How far a run has come, and what was done at which step."""

    start: int
    """Finished steps when this process began."""
    step: int
    """Finished steps."""
    saved: Path | None
    """The newest checkpoint."""
    saved_step: int = -1
    evaluations: Evaluations = field(default_factory=Evaluations)

    @property
    def best(self) -> BestLoss:
        """The lowest evaluation loss so far."""
        return self.evaluations.best


def is_due(step: int, every: int) -> bool:
    """Whether ``step`` is a multiple of ``every``; never where that is 0."""
    return every > 0 and step % every == 0


class Saver:
    """Saves checkpoints, each only if replicas agree."""

    def __init__(
        self, run: Run, probe: Probe, samples: Samples, identity: Identity,
        serve: Callable[[Path], None], cycles: Cycles, average: Average | None,
    ) -> None:  # fmt: skip
        """``serve``: called with each new checkpoint; the others as in ``save_checkpoint``."""
        self.run = run
        self.cycles = cycles
        self.average = average
        self.probe = probe
        self.samples = samples
        self.identity = identity
        self.serve = serve
        model = run.model
        self.drift = DriftCheck(model.adapted, model.shards, run.groups, model.whole)

    def count_step(self, now: Progress) -> None:
        """Take note of a step that has been taken."""
        now.step += 1
        # Behind the optimizer, before anything is saved of this step.
        if self.average is not None:
            self.average.update()

    def check_replicas(self, now: Progress, saving: bool) -> None:
        """Compare replicas where that is due: before saving, in the first step, every so often."""
        every = self.run.config.train.check_replicas_every
        # The first step is where a missing reduction shows.
        if every and (saving or now.step <= now.start + 1 or is_due(now.step, every)):
            self.drift.run(now.step, now.saved)

    def save(self, now: Progress) -> None:
        """Write a checkpoint and hand its adapter to the server; collective."""
        run = self.run
        # The probe runs before the files are written, because they hold what it says.
        probed = self.probe.run(run.stepper)
        beside = Beside(run.stepper.kept.get("start"), self.cycles.count, self.average)
        now.saved = save_checkpoint(
            now.step, now.evaluations, self.samples, self.identity, run.config, run.model,
            run.optimizer, probed, beside,
        )  # fmt: skip
        now.saved_step = now.step
        self.serve(now.saved)
