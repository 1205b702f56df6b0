"""What became of an adapter when it was merged: how much of every module's delta survived the cast
to the base's dtype."""

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalora.hf.tensor_names import within_layer

REPORT = "merge_report.json"
LOSSY = 0.1
"""Relative error of a delta from which the text says so."""


@dataclass(frozen=True)
class MergedModule:
    """One linear W with its delta D = s * B A, stored as W' = cast(W + D). Products are over all
    elements."""

    module: str
    """Its Hugging Face name, such as ``model.layers.3.mlp.experts.7.gate_proj``."""
    dtype: str
    """Of the base's weight and of the merged one."""
    delta: float
    """|D|, Frobenius."""
    survived: float | None
    """<W' - W, D> / <D, D>: the fraction of the delta that is in the merged weight; None where D is
    zero."""
    error: float | None
    """|(W' - W) - D| / |D|; None where D is zero."""


@dataclass(frozen=True)
class MergeReport:
    adapter: Path
    base: str
    out: Path
    num_bytes: int
    """Of the merged model's weights."""
    modules: tuple[MergedModule, ...]
    notes: tuple[str, ...] = ()
    """What the adapter's folder holds beside the factors."""

    def text(self) -> str:
        """A table with a row per projection, over all its layers and experts."""
        groups: dict[tuple[str, str], list[MergedModule]] = defaultdict(list)
        for m in self.modules:
            groups[projection(m.module), m.dtype].append(m)
        width = max(len("projection"), *(len(name) for name, _ in groups)) + 2
        lines = [
            (
                f"{self.adapter} merged into {self.base}: {len(self.modules):,} modules,"
                f" {self.num_bytes / 1e9:,.3f} GB in {self.out}"
            ),
            (
                f"{'projection':<{width}}{'dtype':>9}{'modules':>9}{'zero':>6}"
                f"{'survived: lowest':>18}{'mean':>8}{'error: largest':>16}{'mean':>9}"
            ),
            *(
                _line(f"{name:<{width}}{dtype:>9}", modules)
                for (name, dtype), modules in groups.items()
            ),
        ]
        zero = sum(m.survived is None for m in self.modules)
        lines += [f"the adapter is zero in {zero:,} modules: they are the base's"] if zero else []
        lossy = [m for m in self.modules if m.error is not None and m.error > LOSSY]
        if lossy:
            worst = max(lossy, key=lambda m: m.error or 0)
            lines.append(
                f"{len(lossy):,} deltas changed by more than {LOSSY:.0%} when cast,"
                f" {worst.module}'s by {worst.error:.0%}: they are small beside the steps of"
                f" {worst.dtype}. Serve the adapter unmerged, or merge into a float32 copy of the"
                " base"
            )
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Everything, with a row per module."""
        fields = {
            "adapter": str(self.adapter),
            "base": self.base,
            "out": str(self.out),
            "num_bytes": self.num_bytes,
        }
        return fields | {"modules": [asdict(m) for m in self.modules]}


def projection(module: str) -> str:
    """The module's name without numbers: ``self_attn.q_proj``, ``mlp.experts.*.down_proj``,
    ``lm_head``."""
    return re.sub(r"\.\d+\.", ".*.", within_layer(module))


def _line(head: str, modules: list[MergedModule]) -> str:
    survived = [m.survived for m in modules if m.survived is not None]
    errors = [m.error for m in modules if m.error is not None]
    head += f"{len(modules):>9,}{len(modules) - len(survived) or '-':>6}"
    if not survived:
        return head + f"{'-':>18}{'-':>8}{'-':>16}{'-':>9}"
    means = (sum(values) / len(values) for values in (survived, errors))
    return head + "{:>18.4f}{:>8.4f}{:>16.1e}{:>9.1e}".format(
        *(x for pair in zip((min(survived), max(errors)), means, strict=True) for x in pair)
    )
