"""Save the checkpoints of a run, and remember how far it has come."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalora.adapters.best_loss import BestLoss, Evaluations
from megalora.adapters.training_state import SavedState
from megalora.first_rank import any_rank
from megalora.parallel import host_group
from megalora.train.assemble import Run
from megalora.train.average import Average, average_of
from megalora.train.checkpoint.background import Background, Pace, Save
from megalora.train.checkpoint.identity import Identity, Samples
from megalora.train.checkpoint.pieces import OwnedPieces
from megalora.train.checkpoint.save import Beside, CheckpointWriter, Texts
from megalora.train.drift import DriftCheck
from megalora.train.held_check import HeldCheck
from megalora.train.probe import Probe
from megalora.train.relora import Cycles
from megalora.train.warm.restore import InMemory
from megalora.train.warm.rounds import Rounds
from megalora.train.warm.snapshots import Snapshots

CLOSE_S = 60.0
SHORT_CLOSE_S = 5.0
"""Seconds that a run with a mistake waits for saves that have begun, and one that has crashed."""


@dataclass
class Progress:
    """How far a run has come, and what was done at which step."""

    start: int
    """Finished steps when this process began."""
    step: int
    """Finished steps."""
    saved: Path | None
    """The newest checkpoint that is whole."""
    saved_step: int = -1
    """The last step whose save has begun."""
    evaluations: Evaluations = field(default_factory=Evaluations)

    @property
    def best(self) -> BestLoss:
        """The lowest evaluation loss so far."""
        return self.evaluations.best

    def take_saved(self, state: SavedState | None) -> None:
        """Take this for the newest checkpoint, where a run goes on from memory; None: there is
        none."""
        self.saved = state.folder if state else None
        self.saved_step = state.step if state else -1


def is_due(step: int, every: int) -> bool:
    """Whether ``step`` is a multiple of ``every``; never where that is 0."""
    return every > 0 and step % every == 0


class Saver:
    """Saves checkpoints while training goes on, each only if replicas agree."""

    def __init__(
        self, run: Run, probe: Probe, samples: Samples, identity: Identity,
        serve: Callable[[Path], None], cycles: Cycles, average: Average | None,
        say: Callable[[str], None], writer: CheckpointWriter, snapshots: Snapshots | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            serve: called with each new checkpoint.
            say: called with lines for the user.
            snapshots: in memory; None where none are taken.
        """
        self.run = run
        self.cycles = cycles
        self.average = average
        self.probe = probe
        self.samples = samples
        self.identity = identity
        self.serve = serve
        self.say = say
        self.writer = writer
        self.snapshots = snapshots
        self.background = Background(say)
        model = run.model
        self.codes = HeldCheck(model.chunks)
        self.drift = DriftCheck(model.adapted, model.shards, run.groups, model.whole)
        self.pace = Pace()

    def count_step(self, now: Progress) -> None:
        """Take note of a step that has been taken."""
        now.step += 1
        # Behind the optimizer, before anything is saved of this step. A bad step changes nothing.
        if self.average is not None and self.run.fault is None:
            self.average.update()
        self.codes.run_once()

    def check_replicas(self, now: Progress, saving: bool) -> None:
        """Compare replicas where that is due: before saving, in the first step, every so often."""
        every = self.run.config.train.check_replicas_every
        # The first step is where a missing reduction shows.
        if every and (saving or now.step <= now.start + 1 or is_due(now.step, every)):
            self.drift.run(now.step, now.saved)

    def save(self, now: Progress) -> None:
        """Begin to save this step; collective. Returns when everything is copied that training
        changes."""
        run = self.run
        writer = self.writer
        self.pace.begin()
        run.pulse.at(now.step, "save")
        # The probe runs before the files are written, because they hold what it says.
        probed = self.probe.run(run.stepper)
        snapshot = self.background.snapshot(now.step)
        writer.take(snapshot, self._beside)
        texts = self._texts(now, probed)
        self.background.begin(Save(now.step, lambda: writer.write(snapshot, texts), snapshot))
        now.saved_step = now.step
        self.pace.end()

    def hold(self, now: Progress) -> None:
        """Begin to put this step into memory, where that is due (``checkpoint.snapshots``)."""
        # What a run has begun with is there already, or on disk.
        if self.snapshots is None or now.step == now.start:
            return
        if is_due(now.step, self.snapshots.every):
            self.snapshots.take(now.step, self._beside, self._texts(now, {}).state)

    @property
    def _beside(self) -> Beside:
        return Beside(self.run.stepper.kept.get("start"), self.cycles.count, self.average)

    def _texts(self, now: Progress, probed: dict[str, Any]) -> Texts:
        return self.writer.texts(
            now.step,
            now.evaluations,
            self.samples,
            self.identity,
            probed,
            self.cycles.count,
            self.run.bad_steps.spikes.losses,
            self.run.bad_steps.left_out,
        )

    def due(self, step: int) -> bool:
        """Whether ``checkpoint.every`` has a save here, on all ranks alike; collective where that
        is "auto"."""
        every = self.run.config.checkpoint.every
        if every != "auto":
            return is_due(step, every)
        # Clocks of ranks differ.
        return not any_rank([bool(self.background.pending) or self.pace.rests])[0]

    def take_note(self, now: Progress) -> None:
        """See which saves have ended, on all ranks alike: their checkpoints are whole, or the run
        ends with what has failed; call it once a step, before a collective. Collective while a save
        is under way."""
        # Its buffer is used again, and all ranks have it whole before one writes over an older one.
        if self.snapshots is not None:
            self.snapshots.settle()
        pending = self.background.pending
        while pending:
            error = pending[0].error
            # Contact to a rank is lost, or a bug of ours: the others may never hear of it.
            if error is not None and not isinstance(error, ValueError):
                raise error
            # Ranks end at different times, and must take note at the same step.
            if any_rank([not pending[0].done])[0]:
                return
            self._end(pending.pop(0), now)

    def finish(self, now: Progress) -> None:
        """Wait for all saves; collective."""
        self.run.pulse.at(now.step, "save")
        self.background.finish()
        self.take_note(now)

    def say_what_failed(self) -> None:
        """Say which saves have failed or are not on disk, where the run ends with another error."""
        for save in self.background.pending:
            # A rank that is lost, or a bug, is what the run ends with.
            if isinstance(save.error, ValueError):
                self.say(str(save.error))
            elif not save.done:
                self.say(f"step {save.step}: its save was not finished")

    def _end(self, save: Save, now: Progress) -> None:
        if save.error is not None:
            may_fail = self.run.config.checkpoint.on_error == "continue"
            # The adapter of the last step is what the run was for.
            if not may_fail or now.step == save.step:
                raise save.error
            self.say(f"{save.error}; training goes on")
            return
        now.saved = self.writer.folder(save.step)
        self.serve(now.saved)


@contextmanager
def saving(
    run: Run, probe: Probe, samples: Samples, identity: Identity,
    serve: Callable[[Path], None], cycles: Cycles, state: SavedState | None,
    say: Callable[[str], None], in_memory: InMemory | None = None,
) -> Iterator[Saver]:  # fmt: skip
    """A run's ``Saver``, as long as the block runs; its arguments. Saves that have begun are ended
    also where the block fails.

    Args:
        state: the checkpoint to go on from, which has the average of the adapter.
        in_memory: where snapshots are put (``checkpoint.snapshots``).
    """
    average = average_of(run.model, run.config.train.ema_decay, state)
    with host_group() as group:
        pieces = OwnedPieces(run.model, run.optimizer)
        writer = CheckpointWriter(run.config, run.model, pieces, group)
        snapshots = None
        options = run.config.checkpoint.snapshots
        if in_memory is not None and options is not None:
            rank = dist.get_rank()
            rounds = None
            if in_memory.outbox is not None:
                every = options.replicate
                rounds = Rounds(every, rank, in_memory.outbox, in_memory.step, any_rank)
            snapshots = Snapshots(
                in_memory.memory, options.every, writer, rank, rounds, in_memory.fetched
            )
        saver = Saver(run, probe, samples, identity, serve, cycles, average, say, writer, snapshots)
        try:
            yield saver
        except BaseException as error:
            # A mistake is raised on all ranks, whose threads end together.
            wait_s = CLOSE_S if isinstance(error, ValueError) else SHORT_CLOSE_S
            saver.background.finish(wait_s)
            saver.say_what_failed()
            raise
