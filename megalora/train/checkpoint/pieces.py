"""Name what this rank saves: for each tensor, which slice of it lies where.

Under the distributed optimizer the data-parallel replicas of a parameter share out its elements;
masters and moments are only there. Whatever else has a parameter's shape is saved in the same
slices. Of tensor-parallel replicas the first saves, of a tied embedding the first stage's copy: so
the world saves every element of every tensor once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megalora.adapters.files import AVERAGE_KEY, START_KEY, STATE_KEYS
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.shards import FactorShard
from megalora.lora.slices import Slice
from megalora.parallel import Groups
from megalora.train.optim import owned_runs


@dataclass(frozen=True)
class Block:
    """Elements of one tensor in memory, which are slices of saved tensors one after the other."""

    key: str
    tensor: Tensor
    """``[sum of the slices' elements]``, contiguous."""
    pieces: tuple[tuple[str, Slice], ...]
    """(name, slice) of each."""


@dataclass(frozen=True)
class _Run:
    """Elements ``[start, end)`` of a flattened parameter, and the slices that they are."""

    parameter: nn.Parameter
    start: int
    end: int
    pieces: tuple[tuple[str, Slice], ...]


class OwnedPieces:
    """What this rank saves of a model in training. Which elements these are does not change."""

    def __init__(self, model: AdaptedModel, optimizer: Any, *, replicas: bool = False) -> None:
        """``replicas``: those of tensor-parallel replicas too, which every rank reads and one
        saves."""
        self.model = model
        self.dtypes: dict[str, Any] = {}
        """Tensor name -> dtype of its parameter, of this rank's pieces."""
        by_parameter = _saved_shards(model, replicas)
        self._owned = []
        for run in owned_runs(optimizer):
            pieces = tuple(_pieces(by_parameter.get(run.parameter, []), run.start, run.end))
            if pieces:
                self._owned.append((run, _Run(run.parameter, run.start, run.end, pieces)))
        self._frozen: list[_Run] = []
        for parameter, shards in by_parameter.items():
            # No optimizer shares it out: one replica saves all of it.
            if not parameter.requires_grad and _is_first_replica(parameter, model.groups):
                pieces = tuple(_pieces(shards, 0, parameter.numel()))
                self._frozen.append(_Run(parameter, 0, parameter.numel(), pieces))
        for run in (*(run for _, run in self._owned), *self._frozen):
            for name, _ in run.pieces:
                self.dtypes[name] = run.parameter.dtype

    def blocks(
        self,
        start: Mapping[nn.Parameter, Tensor] | None = None,
        average: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> Iterator[Block]:
        """The pieces as they are now: views of what is being trained.

        Args:
            start: parameter -> its value when the run began, where that is saved too.
            average: parameter -> its moving average, likewise.
        """
        trained = [run for _, run in self._owned]
        for owned, run in self._owned:
            state = owned.state()
            for key in STATE_KEYS:
                yield Block(key, state[key], run.pieces)
        # What is not trained is its own master, and has no moments.
        yield from _blocks(STATE_KEYS[0], self.model.values(), self._frozen)
        if start is not None:
            yield from _blocks(START_KEY, start, trained)
        if average is not None:
            yield from _blocks(AVERAGE_KEY, average, [*trained, *self._frozen])


def _blocks(key: str, values: Mapping[nn.Parameter, Tensor], runs: list[_Run]) -> Iterator[Block]:
    for run in runs:
        flat = values[run.parameter].detach().reshape(-1)
        yield Block(key, flat[run.start : run.end], run.pieces)


def _saved_shards(model: AdaptedModel, replicas: bool) -> dict[nn.Parameter, list[FactorShard]]:
    """The shards that this rank or its data-parallel replicas save, by parameter, in the order of
    their elements."""
    tied = {weight.tensor for weight in model.whole if weight.tied}
    shards: dict[nn.Parameter, list[FactorShard]] = {}
    for shard in model.shards:
        group = model.groups.named(shard.group)
        # Neighbours are replicas of each other, of whom the first one saves.
        is_replica = group.rank() % (group.size() // shard.num_shards) != 0
        # The last stage has a copy of what the first one saves.
        is_replica |= shard.name in tied and model.groups.pp.rank() > 0
        if is_replica and not replicas:
            continue
        shards.setdefault(shard.parameter, []).append(shard)
    return shards


def _is_first_replica(parameter: Any, groups: Groups) -> bool:
    # ``allreduce`` is False of experts whose replicas are spread over another group.
    group = groups.dp_cp if parameter.allreduce else groups.edp
    return group.rank() == 0


def _pieces(shards: list[FactorShard], start: int, end: int) -> Iterator[tuple[str, Slice]]:
    """What elements ``[start, end)`` of a flattened parameter are of its tensors."""
    place = start
    for first, shard in sorted(((shard.first_element, shard) for shard in shards), key=_first):
        part = shard.slice
        begin = max(start, first)
        stop = min(end, first + part.numel)
        if begin >= stop:
            continue
        # A gap would shift every piece behind it.
        assert begin == place, f"elements of {shard.name} do not follow the tensor before it"
        yield shard.name, part.part(begin - first, stop - first)
        place = stop
    # Still at the start where this rank saves nothing of the parameter.
    assert place in (start, end), "a parameter has elements that are of no tensor"


def _first(item: tuple[int, FactorShard]) -> int:
    return item[0]
