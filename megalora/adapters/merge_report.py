"""Report how much of every module's delta survived a merge's cast to the base's dtype."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalora.hf.tensor_names import within_layer

REPORT = "merge_report.json"
LOSSY = 0.1
"""Relative error of a delta above which the text warns of it."""
SURVIVES = 0.9
"""Fraction of a delta that must be in the merged weight where the base is quantised."""


@dataclass(frozen=True)
class MergedModule:
    """One linear W with its delta D = s * B A, stored as W' = cast(W + D). Products are over all
    elements."""

    module: str
    """Hugging Face name, such as ``model.layers.3.mlp.experts.7.gate_proj``."""
    dtype: str
    """Dtype of the base's weight and of the merged one."""
    delta: float
    """Frobenius norm |D|."""
    survived: float | None
    """<W' - W, D> / <D, D>: the fraction of the delta that is in the merged weight; None where D is
    zero."""
    error: float | None
    """|(W' - W) - D| / |D|; None where D is zero."""


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge."""

    adapter: Path
    base: str
    out: Path
    num_bytes: int
    """Bytes of the merged model's weights."""
    modules: tuple[MergedModule, ...]
    notes: tuple[str, ...] = ()
    """Lines about what the adapter's folder holds beside the factors."""

    def text(self) -> str:
        """A table with a row per projection, over all its layers and experts."""
        groups: dict[tuple[str, str], list[MergedModule]] = defaultdict(list)
        for m in self.modules:
            # A base may mix dtypes, which lose different amounts.
            groups[projection(m.module), m.dtype].append(m)
        names = ["projection", *(name for name, _ in groups)]
        width = max(map(len, names)) + 2
        lines = [
            (
                f"{self.adapter} merged into {self.base}: {len(self.modules):,} modules,"
                f" {self.num_bytes / 1e9:,.3f} GB in {self.out}"
            ),
            (
                f"{'projection':<{width}}{'dtype':>9}{'modules':>9}{'zero':>6}"
                f"{'survived: lowest':>18}{'mean':>8}{'error: largest':>16}{'mean':>9}"
            ),
        ]
        for (name, dtype), modules in groups.items():
            lines.append(_line(f"{name:<{width}}{dtype:>9}", modules))
        zero = 0
        lossy = []
        for m in self.modules:
            if m.error is None:
                zero += 1
            elif m.error > LOSSY:
                lossy.append(m)
        # Not an error: engines want zeros beside what was trained.
        if zero:
            lines.append(f"the adapter is zero in {zero:,} modules: they are the base's")
        if lossy:
            worst = max(lossy, key=lambda m: m.error or 0)
            lines.append(
                f"{len(lossy):,} deltas changed by more than {LOSSY:.0%} when cast,"
                f" {worst.module}'s by {worst.error:.0%}: they are small beside the steps of"
                f" {worst.dtype}. Serve the adapter unmerged, or merge into a float32 copy of the"
                " base"
            )
        return "\n".join([*lines, *self.notes])

    def write(self, folder: Path, *, allow_loss: bool) -> None:
        """Write ``merge_report.json``; raises ``ValueError`` where less than ``SURVIVES`` of a
        module's delta is in the merged weight, unless that is allowed."""
        if not allow_loss:
            self._check_survived()
        (folder / REPORT).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    def _check_survived(self) -> None:
        lost: list[MergedModule] = []
        for m in self.modules:
            # NaN is a loss too.
            if m.survived is not None and not m.survived >= SURVIVES:
                lost.append(m)
        if not lost:
            return
        worst = min(lost, key=lambda m: m.survived or 0.0)
        total = len(self.modules)
        raise ValueError(
            f"of {len(lost):,} of {total:,} deltas less than {SURVIVES} would survive in"
            f" {worst.dtype}, of {worst.module}'s {worst.survived:.2f}: they are small beside"
            " its steps. Merge from the original (--original), or serve base and adapter side by"
            " side; --allow-loss merges all the same"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, with a row per module."""
        return {
            "adapter": str(self.adapter),
            "base": self.base,
            "out": str(self.out),
            "num_bytes": self.num_bytes,
            "modules": [asdict(m) for m in self.modules],
            "notes": list(self.notes),
        }


def measured(module: str, dtype: str, sums: Sequence[float]) -> MergedModule:
    """What survived of a module's delta.

    Args:
        dtype: what the merged weight was rounded to.
        sums: <kept, delta>, <delta, delta> and <lost, lost>, where kept is what of the delta is in
            the merged weight, and lost the difference of the two.
    """
    kept_delta, delta_delta, lost_lost = sums
    if not delta_delta:
        return MergedModule(module, dtype, 0.0, None, None)
    survived = kept_delta / delta_delta
    error = math.sqrt(lost_lost / delta_delta)
    return MergedModule(module, dtype, math.sqrt(delta_delta), survived, error)


def projection(module: str) -> str:
    """The module's name without numbers: ``self_attn.q_proj``, ``mlp.experts.*.down_proj``,
    ``lm_head``."""
    return re.sub(r"\.\d+\.", ".*.", within_layer(module))


def _line(head: str, modules: list[MergedModule]) -> str:
    """Modules of one projection as a line of the table, behind its name and dtype."""
    survived = []
    errors = []
    for m in modules:
        # Both are None where the delta is zero: a fraction of nothing.
        if m.survived is not None and m.error is not None:
            survived.append(m.survived)
            errors.append(m.error)
    head += f"{len(modules):>9,}{len(modules) - len(survived) or '-':>6}"
    if not survived:
        return head + f"{'-':>18}{'-':>8}{'-':>16}{'-':>9}"
    mean_survived = sum(survived) / len(survived)
    mean_error = sum(errors) / len(errors)
    return (
        f"{head}{min(survived):>18.4f}{mean_survived:>8.4f}{max(errors):>16.1e}{mean_error:>9.1e}"
    )
