"""Keep the adapter that a run began with, where its objective compares with that.

Every checkpoint has it, so that a resumed run does not take the adapter it resumes from for its
start, whatever the layout and wherever the checkpoint was copied to.
"""

from torch import Tensor, nn

from megalora.adapters.files import START_KEY
from megalora.adapters.saved_tensors import SavedTensors
from megalora.adapters.training_state import SavedState
from megalora.lora.adapted_model import AdaptedModel
from megalora.train.read_shards import read_shards
from megalora.train.references import Start


def start_of(state: SavedState | None, model: AdaptedModel) -> Start:
    """A copy of the adapter as it was at the run's first step.

    Args:
        state: the checkpoint that the model's adapter was read from; None for a fresh one.
    Raises:
        ValueError: the checkpoint's copy is damaged or of another adapter.
    """
    start: dict[nn.Parameter, Tensor] = {}
    # What is not trained is the same at every step.
    for shard in model.trained:
        start[shard.parameter] = shard.parameter.data.clone()
    # A fresh run and an imported adapter begin here; a run's own checkpoint lies behind its start.
    if state is not None and state.imported_from is None:
        with SavedTensors(state.folder) as saved:
            read_shards(saved, START_KEY, model.trained, start)
    return start
