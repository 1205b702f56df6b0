"""Follow the evaluations of a run and their lowest loss. No torch."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BestLoss:
    """The lowest evaluation loss so far, and how long ago that was.

    As in transformers' EarlyStoppingCallback: only a lower loss is a new one, not an equal one, and
    every other evaluation counts, one that is NaN too.
    """

    loss: float | None = None
    """None before the first evaluation that was a number."""
    step: int = 0
    """Finished steps at that evaluation."""
    since: int = 0
    """Evaluations after it, none of them lower; all of them where ``loss`` is None."""

    def followed_by(self, step: int, loss: float) -> "BestLoss":
        """The same after one more evaluation."""
        # NaN is below nothing, but it is not above anything either.
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            return BestLoss(loss, step)
        return replace(self, since=self.since + 1)

    def is_out_of(self, patience: int) -> bool:
        """Whether so many evaluations have passed without a lower loss; never for 0."""
        return 0 < patience <= self.since

    def words(self) -> str:
        """What is lowest, for messages."""
        if self.loss is None:
            return "none was a number"
        return f"the lowest is {self.loss:.4f} of step {self.step}"


@dataclass(frozen=True)
class Evaluations:
    """What a run knows of its evaluations."""

    best: BestLoss = BestLoss()
    last_step: int = -1
    """Finished steps at the last one, so that none is done twice; -1 before the first."""

    def followed_by(self, step: int, loss: float | None) -> "Evaluations":
        """The same after one more; ``loss`` is None where there is no data for one."""
        # Of the base there is no checkpoint.
        if loss is None or step == 0:
            return Evaluations(self.best, step)
        return Evaluations(self.best.followed_by(step, loss), step)
