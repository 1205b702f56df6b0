"""List the sizes of work whose rates a config's plan asks for, those of the best layouts first.

The layouts are ordered by assumed rates, and each is priced on a machine that notes what it is
asked.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from megalora.planner.cost import step_time
from megalora.planner.hardware import Estimate, Kind, Machine, Network, Rate
from megalora.planner.own_layout import own_layout
from megalora.planner.question import Question
from megalora.planner.search import Planned, search
from megalora.planner.weights import PlannedModel


class Size(NamedTuple):
    """One size of one kind of work."""

    kind: str
    """gemm, grouped_gemm, attention or memory, or the name of a collective."""
    sizes: tuple[float, ...]
    """As ``Machine`` lists them; of a collective (ranks, nodes, bytes)."""


@dataclass(frozen=True)
class SizesAsked:
    """What a plan asks for."""

    layouts: dict[Size, int]
    """Size -> place of the first layout that needs it, from 1, in that order."""
    num_layouts: int


@dataclass(frozen=True)
class _NotedRate:
    """A rate that notes the sizes at which it is asked for."""

    kind: str
    rate: Rate
    noted: dict[Size, None]

    def at(self, *sizes: float) -> Estimate:
        self.noted[Size(self.kind, sizes)] = None
        return self.rate.at(*sizes)


@dataclass(frozen=True)
class _NotedNetwork:
    """The same of collectives."""

    network: Network
    noted: dict[Size, None]

    def seconds(self, kind: Kind, ranks: int, nodes: int, num_bytes: float) -> Estimate:
        # A rank by itself sends nothing.
        if ranks > 1:
            self.noted[Size(kind, (ranks, nodes, num_bytes))] = None
        return self.network.seconds(kind, ranks, nodes, num_bytes)


def sizes_asked(question: Question, num_ranks: int) -> SizesAsked:
    """Sizes that the plan of ``num_ranks`` ranks asks for: the layout that it takes, the config's
    own, the other rows of its table, then every other layout that fits.

    Raises:
        ValueError: no layout fits, or as ``search``.
    """
    lora = question.config.lora
    plan = search(question.shape, lora, num_ranks, question.work, question.machine)
    best = plan.best()
    ordered = [best]
    own = own_layout(question, num_ranks, lora.rank).planned
    if own is not None:
        ordered.append(own)
    ordered += [*plan.layouts(), *plan.fitting]
    # A layout comes up to three times: the first place counts.
    layouts = {found.layout: found for found in reversed(ordered)}
    order = dict.fromkeys(found.layout for found in ordered)
    model = PlannedModel.of(question.shape, lora)
    asked: dict[Size, int] = {}
    for place, layout in enumerate(order, 1):
        for size in _sizes_of(model, layouts[layout], question):
            asked.setdefault(size, place)
    return SizesAsked(asked, len(order))


def _sizes_of(model: PlannedModel, found: Planned, question: Question) -> dict[Size, None]:
    """What one layout's prediction asks for."""
    noted: dict[Size, None] = {}
    machine = noting(question.machine, noted)
    step_time(model, found.layout, question.work, machine)
    return noted


def noting(machine: Machine, noted: dict[Size, None]) -> Machine:
    """The machine, with every size that it is asked for written to ``noted``."""
    return replace(
        machine,
        gemm=_NotedRate("gemm", machine.gemm, noted),
        grouped_gemm=_NotedRate("grouped_gemm", machine.grouped_gemm, noted),
        # Both directions of attention are measured together.
        attention=_NotedRate("attention", machine.attention, noted),
        attention_backward=_NotedRate("attention", machine.attention_backward, noted),
        memory=_NotedRate("memory", machine.memory, noted),
        network=_NotedNetwork(machine.network, noted),
    )
