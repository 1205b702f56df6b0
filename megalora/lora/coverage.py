"""Check that every adapter tensor the table demands exists and that each of them learns; list what
is trained."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.hf.tensor_names import parse_factor
from megalora.lora.shards import FactorShard
from megalora.lora.spec import Adapted, expected_tensors
from megalora.model.shape import ModelShape
from megalora.wording import first_few


def check_coverage(adapted: list[Adapted], pieces: list[FactorShard]) -> None:
    """Compare what the table demands with what exists over all ranks; raises ``RuntimeError`` that
    names what differs.

    A bit for each tensor of the table travels, not its name: names of 36,864 tensors from each of
    512 ranks are 1.4 GB.
    """
    number = {name: i for i, name in enumerate(expected_tensors(adapted))}
    surplus = {piece.name for piece in pieces} - number.keys()
    held = torch.zeros(len(number) + 1, dtype=torch.uint8)
    held[[number[piece.name] for piece in pieces if piece.name in number]] = 1
    held[-1] = bool(surplus)
    everywhere = held.to(host.device())
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    *found, any_surplus = everywhere.tolist()
    missing = [name for name, there in zip(number, found, strict=True) if not there]
    if missing:
        raise RuntimeError(
            f"{len(missing)} adapter tensors were not adapted: {first_few(sorted(missing), 5)}"
        )
    if any_surplus:
        named: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(named, surplus)
        names = sorted(set().union(*named))
        raise RuntimeError(f"{len(names)} adapter tensors should not exist: {first_few(names, 5)}")


def write_manifest(path: Path, adapted: list[Adapted]) -> None:
    """Every adapted projection with its tensors counted, layer by layer; written once coverage is
    proved."""
    rows = [
        {
            "module": a.hf_module("*") if a.num_experts else a.hf_module(),  # type: ignore
            "layer": a.layer, "experts": a.num_experts or None,
            "rank": a.rank, "alpha": a.alpha, "scale": a.scale, "A": a.shape("A"),
            "B": a.shape("B"),
            "tensors": 2 * len(a.hf_modules()), "parameters": a.num_parameters(),
        }
        for a in adapted
    ]  # fmt: skip
    total = {
        "tensors": sum(r["tensors"] for r in rows),
        "parameters": sum(r["parameters"] for r in rows),
    }
    path.write_text(json.dumps({"total": total, "adapted": rows}, indent=1) + "\n")


class _Parts:
    """Parts of this rank's parameters that belong to one projection, all experts together."""

    def __init__(self) -> None:
        self.views: dict[tuple[int, nn.Parameter, tuple[Any, ...]], None] = {}
        self.numbers = torch.empty(0)

    def add(self, number: int, piece: FactorShard) -> None:
        """``piece`` belongs to projection ``number``."""
        each_expert = piece.parameter.dim() == 3
        index = (slice(None), *piece.index[1:]) if each_expert else piece.index
        self.views[number, piece.parameter, index] = None

    def to(self, device: torch.device) -> None:
        self.numbers = torch.tensor(
            [number for number, _, _ in self.views], dtype=torch.int64, device=device
        )

    def mark_nonzero(self, alive: Tensor) -> None:
        """Count up ``alive[number]`` where a projection has a gradient that is not zero; nothing is
        read on the host."""
        if self.views:
            found = [parameter.main_grad[index].any() for _, parameter, index in self.views]  # type: ignore
            alive.index_add_(0, self.numbers, torch.stack(found).to(alive.dtype))


class GradientCheck:
    """Stops a run in which some group of factors cannot learn.

    B's gradient is non-zero from the first step on; A's once a step has moved B off zero. A group
    is one projection of one layer, all experts together: single experts may have had no token.
    """

    def __init__(self, adapted: list[Adapted], pieces: list[FactorShard]) -> None:
        self.labels = [
            f"layer {a.layer} {a.name}" if a.layer is not None else a.name for a in adapted
        ]
        number = {m: i for i, a in enumerate(adapted) for m in a.hf_modules()}
        self.parts = {"A": _Parts(), "B": _Parts()}
        for piece in pieces:
            parsed = parse_factor(piece.name)
            assert parsed is not None
            module, factor = parsed
            self.parts[factor].add(number[module], piece)
        for parts in self.parts.values():
            parts.to(host.device())
        self.pending = {"B", "A"}

    def after_backward(self, b_has_moved: bool) -> None:
        """Look at ``main_grad`` once per factor; collective over the world until both factors have
        been seen."""
        for factor in sorted(self.pending & ({"B", "A"} if b_has_moved else {"B"})):
            alive = torch.zeros(len(self.labels), dtype=torch.int32, device=host.device())
            self.parts[factor].mark_nonzero(alive)
            dist.all_reduce(alive, op=dist.ReduceOp.MAX)
            dead = [label for label, ok in zip(self.labels, alive.tolist(), strict=True) if not ok]
            if dead:
                raise RuntimeError(
                    f"the gradient of {factor} is exactly zero for {len(dead)} of"
                    f" {len(self.labels)} adapted projections ({first_few(dead, 5)}): they would"
                    " never train. This is a bug in the model or the layout; please report it."
                )
            self.pending.discard(factor)


def trainable_summary(adapted: list[Adapted], shape: ModelShape) -> str:
    """The line PEFT prints."""
    trainable = sum(a.num_parameters() for a in adapted)
    total = trainable + shape.num_parameters()
    return (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%:"
        f" {100 * trainable / total:.4f}"
    )
