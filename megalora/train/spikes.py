"""Tell whether a step's loss is a spike: far above those of the steps before it.

    loss > mean + sigma * deviation        of the losses of the last ``window`` steps

as OLMo-core's ``SkipStepOptimizer`` has it, which also decides nothing before half a window of
steps. A spike's own loss enters the window too: where losses stay higher, as behind a change of the
data, they are soon none.
"""

import statistics
from collections.abc import Sequence

from megalora.config import SkipSpikes


class LossSpikes:
    """The last losses of a run; the same on every rank, as long as they are told the same."""

    def __init__(self, options: SkipSpikes | None) -> None:
        """``options``: None where nothing is a spike."""
        self.options = options
        self.losses: list[float] = []

    def resume(self, losses: Sequence[float]) -> None:
        """Go on behind these, which a checkpoint has kept."""
        self.losses = list(losses)
        self._forget()

    def take(self, loss: float) -> str | None:
        """Take note of a step's mean loss, which must be finite; returns what is wrong with it, for
        messages, where it is a spike."""
        if self.options is None:
            return None
        limit = self._limit(self.options)
        number = len(self.losses)
        self.losses.append(loss)
        self._forget()
        if limit is None or loss <= limit:
            return None
        return (
            f"the loss is {loss:.4f}, above {limit:.4f}, {self.options.sigma:g} deviations over the"
            f" mean of the {number} steps before"
        )

    def _limit(self, options: SkipSpikes) -> float | None:
        # Two at least: one has no deviation.
        if len(self.losses) < max(2, options.window // 2):
            return None
        return statistics.fmean(self.losses) + options.sigma * statistics.stdev(self.losses)

    def _forget(self) -> None:
        if self.options is None:
            self.losses = []
        else:
            self.losses = self.losses[-self.options.window :]
