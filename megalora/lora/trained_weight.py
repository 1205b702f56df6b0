"""Weights that are trained whole beside the factors: a row for each says its name, shape and split.

Initialisation, marks, gathering, checkpoints, coverage and the drift check follow from the row, as
those of factors follow from the table in ``spec.py``.

    weight   in memory                 [rows, columns]   split over TP   gradient over TP
    score    output_layer (the head)   [C, H]            replicated      partial: S/t tokens each
"""

from dataclasses import dataclass
from typing import Any

from megalora.hf.tensor_names import SCORE, weight_name
from megalora.model.shape import ModelShape


@dataclass(frozen=True)
class TrainedWeight:
    """A weight of the base, or a new one, that is trained whole."""

    module: str
    """Its HF module, as PEFT's ``modules_to_save`` names it."""
    size: tuple[int, int]
    """Shape of the whole weight."""

    @property
    def tensor(self) -> str:
        """Name of the tensor in an adapter's file."""
        return weight_name(self.module)

    @property
    def num_parameters(self) -> int:
        rows, columns = self.size
        return rows * columns

    def mark(self, parameter: Any, group: Any) -> None:
        """Set on a parameter what reductions read off it (``shards.py``)."""
        parameter.num_shards = 1
        parameter.shard = 0
        # Ranks that hold the same values saw different tokens.
        parameter.sum_group = "tp" if group.size() > 1 else None
        parameter.allreduce = True
        parameter.tensor_model_parallel = False
        parameter.partition_dim = -1
        parameter.partition_stride = 1


def trained_weights(shape: ModelShape) -> list[TrainedWeight]:
    """All such weights of a model, in the order of its layers."""
    if not shape.num_scores:
        return []
    return [TrainedWeight(SCORE, (shape.num_scores, shape.hidden))]
