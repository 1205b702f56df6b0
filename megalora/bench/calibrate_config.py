"""Choose the sizes that calibration measures for one config: those that its plan asks for.

Tables of several axes, such as GEMMs, get the very sizes of the first layouts, then what widens the
range that they span. Of memory passes and collectives, which have one axis, a size for each factor
of two is enough. Whatever a layout asks for then lies between sizes that were measured.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from megalora import host
from megalora.bench.calibrate_cases import COMPUTATIONS, Case, attention, gemm, grouped_gemm
from megalora.bench.calibrate_cases import memory_pass as memory
from megalora.bench.calibrate_collectives import Collectives
from megalora.config import RunConfig
from megalora.first_rank import on_first_rank
from megalora.planner.known_gpus import like_device
from megalora.planner.question import PlanOptions, Question
from megalora.planner.sizes_asked import Size, SizesAsked, sizes_asked

EXACT_LAYOUTS = 11
"""Layouts whose sizes are measured as they are: the rows that a plan shows, and the config's
own."""
NEAR = 2.0
"""Sizes of one axis that differ by a smaller factor are not both measured."""


@dataclass(frozen=True)
class ForConfig:
    """A config whose own sizes are to be measured."""

    config: RunConfig
    imbalance: float = 1.2
    """As the plan will be told."""

    def sizes(self, memory_bytes: int, ranks_per_node: int) -> SizesAsked:
        """What a plan of this config for as many ranks as the world has asks for, on a machine like
        this one; collective.

        Raises:
            ValueError: a config that cannot be planned, or that fits no layout.
        """
        name = host.device_name()
        machine = replace(
            like_device(name), name=name, memory_bytes=memory_bytes,
            ranks_per_node=ranks_per_node, dtype=self.config.model.dtype,
        )  # fmt: skip
        world = dist.get_world_size()
        options = PlanOptions(gpus=[world], gpu=name, imbalance=self.imbalance)

        # Other ranks may have other memory, and would choose other sizes.
        def asked() -> SizesAsked:
            return sizes_asked(Question.on(machine, self.config, options), world)

        return on_first_rank(asked, "what the config names cannot be read")


@dataclass
class _Series:
    """Sizes of one kind that are to be measured, as far as they are chosen."""

    chosen: list[tuple[int, ...]] = field(default_factory=list)

    def takes(self, sizes: tuple[int, ...], exact: bool) -> bool:
        """Whether these sizes are needed beside those chosen before; then they are chosen, too.

        Args:
            exact: whether to take them where they are only new.
        """
        needed = sizes not in self.chosen and (exact or not self._covers(sizes))
        # On one axis, a size that was measured nearby answers as well.
        if needed and exact and len(sizes) == 1:
            needed = not self._covers(sizes) or not self._has_near(sizes[0])
        if needed:
            self.chosen.append(sizes)
        return needed

    def _covers(self, sizes: tuple[int, ...]) -> bool:
        """As ``planner.hardware.Table`` decides between interpolated and extrapolated."""
        # No size spans no range.
        if not self.chosen:
            return False
        axes = zip(*self.chosen, strict=True)
        return all(min(axis) <= n <= max(axis) for n, axis in zip(sizes, axes, strict=True))

    def _has_near(self, size: int) -> bool:
        return any(size / NEAR < other[0] < size * NEAR for other in self.chosen)


def config_cases(
    asked: SizesAsked, collectives: Mapping[tuple[int, int], Collectives], dtype: torch.dtype
) -> list[Case]:
    """A case for each size to measure, in the order in which layouts need them.

    Args:
        collectives: (ranks, nodes) -> what makes collectives in such groups. Groups that are not
            here cannot be made of this world, and are left out.
    """
    series: dict[tuple[object, ...], _Series] = {}
    cases = []
    for size, place in asked.layouts.items():
        for key, sizes in _whole(size, collectives, dtype):
            if series.setdefault(key, _Series()).takes(sizes, place <= EXACT_LAYOUTS):
                case = _case(size, sizes, collectives, dtype)
                cases.append(replace(case, needed_by=place))
    return cases


def _whole(
    size: Size, collectives: Mapping[tuple[int, int], Collectives], dtype: torch.dtype
) -> Iterator[tuple[tuple[object, ...], tuple[int, ...]]]:
    """(series, sizes that can be measured): those below and above, where the plan's own are means
    of packed rows, or bytes that no whole number of elements has."""
    if size.kind in COMPUTATIONS:
        unit = 3 * dtype.itemsize if size.kind == "memory" else 1
        axes = [_around(n, unit) for n in size.sizes]
        for sizes in itertools.product(*axes):
            yield (size.kind,), sizes
        return
    ranks, nodes, num_bytes = size.sizes
    group = (int(ranks), int(nodes))
    if group in collectives:
        for whole in _around(num_bytes, group[0] * dtype.itemsize):
            yield (size.kind, *group), (whole,)


def _around(n: float, unit: int) -> tuple[int, ...]:
    """The multiples of ``unit`` below and above n, at least one unit; n alone where it is one."""
    low = max(1, math.floor(n / unit)) * unit
    high = max(1, math.ceil(n / unit)) * unit
    return (low,) if low == high else (low, high)


def _case(
    size: Size, sizes: tuple[int, ...], collectives: Mapping[tuple[int, int], Collectives],
    dtype: torch.dtype,
) -> Case:  # fmt: skip
    """One size, ready to be timed."""
    if size.kind in COMPUTATIONS:
        make = {"gemm": gemm, "grouped_gemm": grouped_gemm, "attention": attention,
                "memory": memory}[size.kind]  # fmt: skip
        return make(*sizes, dtype)
    ranks, nodes, _ = size.sizes
    return collectives[int(ranks), int(nodes)].case(size.kind, *sizes)


def left_out(left: Sequence[Case], cases: Sequence[Case], why: str) -> str:
    """What of a config's ``cases`` is not measured, on one line."""
    kinds = Counter(case.kind for case in left)
    words = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    num_all = sum(case.needed_by > 0 for case in cases)
    first = min(case.needed_by for case in left)
    return (
        f"left out {why}: {len(left)} of {num_all} sizes of the config ({words}), first needed by"
        f" its layout {first}; times of what needs them may be extrapolated"
    )
