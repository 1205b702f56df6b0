"""Check that every adapter tensor the table demands exists and that each of them learns; list what
is trained."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.hf.tensor_names import bias_name, weight_name
from megalora.lora.shards import FactorShard
from megalora.lora.spec import FACTORS, Adapted, FactorName, expected_tensors
from megalora.lora.trained_weight import TrainedWeight, trained_weights
from megalora.model.shape import ModelShape
from megalora.wording import first_few


def check_coverage(
    adapted: list[Adapted], shards: list[FactorShard], whole: Sequence[TrainedWeight] = ()
) -> None:
    """Compare what the table demands with what exists over all ranks; raises ``RuntimeError`` that
    names what differs.

    A bit for each tensor of the table travels, not its name: names of 36,864 tensors from each of
    512 ranks are 1.4 GB.
    """
    number = {name: i for i, name in enumerate(expected_tensors(adapted, whole))}
    present: list[int] = []
    surplus: set[str] = set()
    for shard in shards:
        if shard.name in number:
            present.append(number[shard.name])
        else:
            surplus.add(shard.name)
    # One flag per tensor of the table, and a last one: this rank holds something else.
    held = torch.zeros(len(number) + 1, dtype=torch.uint8)
    held[present] = 1
    held[-1] = bool(surplus)
    everywhere = held.to(host.device())
    # The maximum over ranks is "some rank holds it".
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    *found, any_surplus = everywhere.tolist()
    missing = _unmarked(number, found)
    if missing:
        raise RuntimeError(
            f"{len(missing)} adapter tensors were not adapted: {first_few(sorted(missing), 5)}"
        )
    if any_surplus:
        # Every rank knows the flag, so every rank comes here; names travel in this case alone.
        named: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(named, surplus)
        names = sorted(set().union(*named))
        raise RuntimeError(f"{len(names)} adapter tensors should not exist: {first_few(names, 5)}")


def _unmarked(names: Iterable[str], marks: list[int]) -> list[str]:
    """The names whose mark is zero."""
    return [name for name, mark in zip(names, marks, strict=True) if not mark]


def write_manifest(path: Path, adapted: list[Adapted], whole: Sequence[TrainedWeight] = ()) -> None:
    """Write a list of every adapted projection with its tensors counted, layer by layer, and of
    weights that are trained whole; call it after ``check_coverage``."""
    rows = []
    total = {"tensors": 0, "parameters": 0}
    for a in adapted:
        row = _manifest_row(a)
        rows.append(row)
        for counted in total:
            total[counted] += row[counted]
    content: dict[str, Any] = {"total": total, "adapted": rows}
    for weight in whole:
        total["tensors"] += 1
        total["parameters"] += weight.num_parameters
        name = f"{weight.module}.bias" if weight.is_bias else weight.module
        content.setdefault("whole", {})[name] = weight.size
    path.write_text(json.dumps(content, indent=1) + "\n")


def _manifest_row(a: Adapted) -> dict[str, Any]:
    module = a.hf_module()
    if a.num_experts:
        # One row for all experts of a layer, which share rank and scale.
        module = a.projection.hf.format(layer=a.layer, expert="*")
    return {
        "module": module,
        "layer": a.layer,
        "experts": a.num_experts or None,
        "rank": a.rank,
        "alpha": a.alpha,
        "scale": a.scale,
        **{factor: a.shape(factor) for factor in a.factors},
        "tensors": sum(map(a.num_tensors, a.factors)),
        "parameters": a.num_parameters(),
    }


class _Parts:
    """Parts of this rank's parameters that belong to one factor of each projection, all experts
    together."""

    def __init__(self) -> None:
        # A dict for its order: each view once, however many experts share it.
        self.views: dict[tuple[int, nn.Parameter, tuple[Any, ...]], None] = {}
        self.numbers = torch.empty(0)

    def add(self, number: int, shard: FactorShard) -> None:
        """Add the parameter part of ``shard``, which belongs to projection ``number``."""
        index = shard.index
        if shard.is_expert:
            # [experts, ...]: all experts at once, rows of this projection alone
            index = (slice(None), *shard.index[1:])
        self.views[number, shard.parameter, index] = None

    def to(self, device: torch.device) -> None:
        """Copy the projections' numbers to the device, once, before training."""
        numbers = [number for number, _, _ in self.views]
        self.numbers = torch.tensor(numbers, dtype=torch.int64, device=device)

    def mark_nonzero(self, alive: Tensor) -> None:
        """Count up ``alive[number]`` where a projection has a gradient that is not zero; nothing is
        read on the host."""
        found: list[Tensor] = []
        for _, parameter, index in self.views:
            found.append(parameter.main_grad[index].any())  # pyright: ignore[reportAttributeAccessIssue]
        # A pipeline stage may have none of them, and an empty list cannot be stacked.
        if found:
            alive.index_add_(0, self.numbers, torch.stack(found).to(alive.dtype))


class GradientCheck:
    """Stops a run in which some group of factors cannot learn.

    B's gradient is non-zero from the first step on, and a magnitude's, and that of a weight that is
    trained whole; A's once a step has moved B off zero. A group is one projection of one layer, all
    experts together: single experts may have had no token.
    """

    def __init__(
        self,
        adapted: list[Adapted],
        shards: list[FactorShard],
        whole: Sequence[TrainedWeight] = (),
    ) -> None:
        self.labels: list[str] = []
        self.expected: dict[FactorName, list[int]] = {}
        """Factor -> which projections have it."""
        number: dict[str, int] = {}
        for i, a in enumerate(adapted):
            # lm_head is in no layer.
            self.labels.append(a.name if a.layer is None else f"layer {a.layer} {a.name}")
            number |= dict.fromkeys(a.hf_modules(), i)
            if a.shared:
                number[a.factor_module(a.shared)] = i
            for factor in a.factors:
                if FACTORS[factor].trained:
                    self.expected.setdefault(factor, []).append(i)
        # Also on a rank that holds none of them.
        self.parts = {factor: _Parts() for factor in self.expected}
        # A weight that is trained whole is a group by itself, without an A or a B.
        # Rows of single tokens have none where a batch lacks these.
        self.whole = [weight.module for weight in whole if not weight.tokens]
        self.whole_parts = _Parts()
        for shard in shards:
            if shard.factor is None:
                if shard.name in (weight_name(shard.module), bias_name(shard.module)):
                    self.whole_parts.add(self.whole.index(shard.module), shard)
            elif shard.factor in self.parts:
                self.parts[shard.factor].add(number[shard.module], shard)
        for parts in self.parts.values():
            parts.to(host.device())
        # Most runs have none, and nothing to copy.
        if self.whole:
            self.whole_parts.to(host.device())
        self.pending = set(self.expected)
        self.whole_pending = bool(self.whole)

    def begin_again(self) -> None:
        """Look at the next gradients as at the first ones: the factors are new."""
        self.pending = set(self.expected)

    def after_backward(self, b_has_moved: bool) -> None:
        """Look at ``main_grad`` once per factor; collective over the world until all factors have
        been seen."""
        # It has a gradient from the first step on, whatever B is.
        if self.whole_pending:
            dead = _unmarked(self.whole, self._alive(self.whole_parts, len(self.whole)))
            if dead:
                raise RuntimeError(
                    f"the gradient of {', '.join(dead)} is exactly zero: it would never train. This"
                    " is a bug in the model or the layout; please report it."
                )
            self.whole_pending = False
        # Sorted, because every rank must enter the collectives in the same order.
        for factor in sorted(self.pending):
            # dL/dA is B^T times something: exactly zero as long as B is.
            if FACTORS[factor].like == "A" and not b_has_moved:
                continue
            alive = self._alive(self.parts[factor], len(self.labels))
            labels = [self.labels[i] for i in self.expected[factor]]
            dead = _unmarked(labels, [alive[i] for i in self.expected[factor]])
            if dead:
                raise RuntimeError(
                    f"the gradient of {factor} is exactly zero for {len(dead)} of"
                    f" {len(labels)} adapted projections ({first_few(dead, 5)}): they would"
                    " never train. This is a bug in the model or the layout; please report it."
                )
            self.pending.discard(factor)

    @staticmethod
    def _alive(parts: _Parts, count: int) -> list[int]:
        """For each of so many groups, whether some rank has a gradient of it that is not zero;
        collective over the world."""
        alive = torch.zeros(count, dtype=torch.int32, device=host.device())
        parts.mark_nonzero(alive)
        dist.all_reduce(alive, op=dist.ReduceOp.MAX)
        return alive.tolist()


def trainable_summary(adapted: list[Adapted], shape: ModelShape) -> str:
    """Trainable and total parameters in the words of PEFT's ``print_trainable_parameters``."""
    trainable = sum(a.num_parameters() for a in adapted)
    trainable += sum(weight.num_parameters for weight in trained_weights(shape))
    total = trainable + shape.num_parameters()
    return (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%:"
        f" {100 * trainable / total:.4f}"
    )
