"""Keep an exponential moving average of the adapter beside it.

    average = decay * average + (1 - decay) * adapter        after every optimizer step

It begins as the adapter that the run begins with. Each rank averages what it holds, so that
replicas stay equal and no layout changes a number.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megalora.adapters.files import AVERAGE_KEY
from megalora.adapters.saved_tensors import SavedTensors
from megalora.adapters.training_state import SavedState
from megalora.lora.adapted_model import AdaptedModel
from megalora.train.read_shards import read_shards


class Average:
    """The average of this rank's adapter parameters, in float32."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._values: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            self._values[parameter] = parameter.detach().float().clone()

    @property
    def values(self) -> Mapping[nn.Parameter, Tensor]:
        """Parameter -> its average, of the same shape."""
        return self._values

    @torch.no_grad()
    def update(self) -> None:
        """Take in the adapter as it is now."""
        # Parameters in bfloat16 are widened one by one, as they are added.
        averages = list(self._values.values())
        # A pipeline stage may have no adapter, and empty lists are refused.
        if not averages:
            return
        # Not one lerp of all: it would need the parameters in float32 at once.
        torch._foreach_mul_(averages, self.decay)
        torch._foreach_add_(averages, list(self._values), alpha=1 - self.decay)


def average_of(model: AdaptedModel, decay: float, state: SavedState | None) -> Average | None:
    """The average of a run, as it was when the run was saved; None where ``decay`` is 0.

    Args:
        model: with the adapter to begin with.
        state: the checkpoint to go on from.
    Raises:
        ValueError: the checkpoint's average is damaged or of another adapter.
    """
    if not decay:
        return None
    average = Average(model.parameters, decay)
    # An imported adapter is a beginning; a checkpoint of the run has averaged already.
    if state is not None and state.imported_from is None:
        with SavedTensors(state.folder) as saved:
            read_shards(saved, AVERAGE_KEY, model.shards, average.values)
    return average
