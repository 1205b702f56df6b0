"""Know the experts that tokens went to while they were sampled, and have them go there again while
they are trained on: routing replay (R3, arXiv 2510.11370).

Two computations of the same token differ by rounding, which is enough to choose another expert now
and then, and another expert is another function. With the choice of the engine, what is left
between engine and training is rounding alone. The weights of the chosen experts are those of the
pass that trains, so that the router and all below it have their gradients.

Shape legend:
    T  tokens of this rank      L  MoE layers      K  experts per token      E  experts
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalora.comm import all_gather
from megalora.model.layer_rows import before_each_layer
from megalora.model.router import FrozenRouter


class Replay:
    """Has the routers of this rank take the choices that a row comes with, where it has any."""

    def __init__(self, chunks: Sequence[nn.Module], moe_layers: Sequence[int]) -> None:
        """``moe_layers``: numbers of the model's layers with experts, from 0, in order."""
        self.places: tuple[int, ...] = ()
        """Places among ``moe_layers`` of those that this rank has: the columns of ``Documents.
        routes``."""
        self.active = True
        self._routes: Tensor | None = None
        found: list[int] = []
        for layer, router in _routers(chunks):
            router.replay = self
            router.place = len(found)
            found.append(moe_layers.index(layer))
        self.places = tuple(found)
        before_each_layer(chunks, self._enter)

    def _enter(self, row: Any) -> None:
        """Know the routes of the row that a layer computes."""
        self._routes = getattr(row, "routes", None)

    def choice_for(self, router: Any) -> Tensor | None:
        """``[T, K]`` int64: the experts that the engine chose, -1 where it says nothing of a token;
        None where the row says nothing at all."""
        if self._routes is None or not self.active:
            return None
        return self._routes[:, router.place]


@contextmanager
def replaying(replay: Replay | None, active: bool) -> Iterator[None]:
    """A block in which a replay has an effect or not; without one nothing happens."""
    if replay is None:
        yield
        return
    before = replay.active
    replay.active = active
    try:
        yield
    finally:
        replay.active = before


class Recorder:
    """Keeps the choices of a model's routers, pass by pass."""

    def __init__(self, chunk: nn.Module) -> None:
        self.routers = [router for _, router in _routers([chunk])]
        self._of_pass: list[Tensor] = []

    def add(self, map_TE: Tensor, top_k: int) -> None:
        """Take note of a layer's choices; layers come in order."""
        # The chosen ones first, in the order of their numbers.
        order = map_TE.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        self._of_pass.append(order[:, :top_k])

    def take(self, tp: ProcessGroup) -> Tensor:
        """``[T, L, K]`` int16 on the CPU: choices of the pass for all tokens of the row, in their
        order; collective over tensor parallelism, which cuts up the row."""
        routes = torch.stack(self._of_pass, 1)
        self._of_pass = []
        # As int32: gloo has no collectives of int16.
        return all_gather(routes.int(), tp).short().cpu()


@contextmanager
def recorded(chunk: nn.Module) -> Iterator[Recorder]:
    """A block in which a model's choices are kept."""
    recorder = Recorder(chunk)
    for router in recorder.routers:
        router.recorder = recorder
    try:
        yield recorder
    finally:
        for router in recorder.routers:
            router.recorder = None


def _routers(chunks: Sequence[nn.Module]) -> list[tuple[int, FrozenRouter]]:
    """(number of its layer in the model, from 0, router) in the order of the layers."""
    found: list[tuple[int, FrozenRouter]] = []
    for chunk in chunks:
        for module in chunk.modules():
            if not isinstance(module, TransformerLayer):
                continue
            routers = [inner for inner in module.modules() if isinstance(inner, FrozenRouter)]
            # Megatron counts from 1, through all stages.
            found += [(module.layer_number - 1, router) for router in routers]
    return found
