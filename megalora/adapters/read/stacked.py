"""Read and write the stacked layout: one A and one B for all experts of a layer, as PEFT's
``target_parameters`` writes them.

    key, beside model.layers.N.mlp.      A                       B
    experts.base_layer   (gate_up)       [E * R, H]              [2I, R * E]
    experts              (down)          [E * r, I]              [H, r * E]

H hidden, I expert intermediate, E experts. Rows of A run over experts slowly, columns of B run over
experts *fast*: B of expert e is every E-th column. gate_up's rows are gate's, then up's. With an
adapter for each of them R is the sum of both ranks, A holds gate's rows above up's, and B is
block-diagonal; where gate and up share one A, B is full.

PEFT before 0.19.1 took the last two dimensions of an expert's weight the other way round: A then is
[E * r, out], B [in, r * E], and the change of the weight is (B A) transposed.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megalora.adapters.read.rules import Rules
from megalora.hf.tensor_names import experts_block
from megalora.lora.spec import Adapted
from megalora.model.shape import ModelShape

GATE_UP = "gate_up_proj"
DOWN = "down_proj"
"""PEFT's names of the two parameters of an expert layer."""
HALVES = ("gate_proj", "up_proj")

ColumnOrder = Literal["rank_major", "grouped_by_expert"]
"""Order of B's columns: every E-th column is an expert's, as in PEFT, or an expert's columns lie
together, as in Unsloth before 2026.9.6."""

type Factors = tuple[Tensor, Tensor]
"""A ``[E, r, in]`` and B ``[E, out, r]``."""


def pack(a_Eri: Tensor, b_Eor: Tensor) -> Factors:
    """The two matrices of a stacked file."""
    return a_Eri.flatten(0, 1).contiguous(), b_Eor.permute(1, 2, 0).flatten(1, 2).contiguous()


def unpack(a: Tensor, b: Tensor, num_experts: int, order: ColumnOrder = "rank_major") -> Factors:
    """The inverse of ``pack``; ``order`` says how the columns of B run."""
    if order == "grouped_by_expert":
        return a.unflatten(0, (num_experts, -1)), b.unflatten(1, (num_experts, -1)).permute(1, 0, 2)
    return a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def transposed(factors: Factors) -> Factors:
    """Factors that PEFT before 0.19.1 wrote, as later versions write them: (B A)^T = A^T B^T."""
    a, b = factors
    return b.transpose(1, 2), a.transpose(1, 2)


def orientations(a: Tensor, b: Tensor, out_features: int, in_features: int) -> list[bool]:
    """How the shapes can be read as an adapter of ``[out, in]`` matrices: False as now, True as
    before PEFT 0.19.1."""
    found = (a.shape[1], b.shape[0])
    readings = []
    # Both, for a square matrix.
    if found == (in_features, out_features):
        readings.append(False)
    if found == (out_features, in_features):
        readings.append(True)
    return readings


def join_gate_up(gate: Factors, up: Factors) -> Factors:
    """One adapter of the fused weight from one for each half."""
    gate_a, gate_b = gate
    up_a, up_b = up
    above = torch.cat([gate_b, gate_b.new_zeros(*gate_b.shape[:2], up_b.shape[2])], 2)
    below = torch.cat([up_b.new_zeros(*up_b.shape[:2], gate_b.shape[2]), up_b], 2)
    return torch.cat([gate_a, up_a], 1), torch.cat([above, below], 1)


def split_gate_up(a_ERi: Tensor, b_EoR: Tensor) -> dict[str, Factors]:
    """An adapter for gate and one for up, of what the fused weight has; a half that nothing acts on
    is left out.

    A block-diagonal B gives each half its own ranks back; a full one gives both halves the A they
    share.
    """
    gate_b, up_b = b_EoR.chunk(2, 1)
    rank = a_ERi.shape[1]
    # Ranks that any expert's gate, or up, reads.
    by_gate_R = gate_b.abs().amax((0, 1)) > 0
    by_up_R = up_b.abs().amax((0, 1)) > 0
    first = int(by_up_R.nonzero()[0]) if by_up_R.any() else rank
    # Block-diagonal: all of gate's ranks come before the first of up's.
    if by_gate_R.any() and first and not by_gate_R[first:].any():
        halves = {"gate_proj": (a_ERi[:, :first], gate_b[:, :, :first])}
        if first < rank:
            halves["up_proj"] = (a_ERi[:, first:], up_b[:, :, first:])
        return halves
    if by_up_R.any() and not by_gate_R.any():
        return {"up_proj": (a_ERi, up_b)}
    return {"gate_proj": (a_ERi, gate_b), "up_proj": (a_ERi, up_b)}


def stacked_factors(
    own: dict[str, tuple[Adapted, Factors]], scale: float, shape: ModelShape
) -> dict[str, Factors]:
    """gate_up's and down's factors of one layer, every scale folded into B so that ``scale`` is the
    one of both.

    ``own``: what was trained in the layer, by the projection's role. A parameter nothing was
    trained in is written as zeros of rank 1, because engines expect both.
    """
    like = next(iter(own.values()))[1][0]

    def of(name: str, rank: int, out_features: int, in_features: int) -> Factors:
        if name in own:
            adapted, (a, b) = own[name]
            return a, b if adapted.scale == scale else b * (adapted.scale / scale)
        return (
            like.new_zeros(shape.num_experts, rank, in_features),
            like.new_zeros(shape.num_experts, out_features, rank),
        )

    hidden = shape.hidden
    size = shape.expert_intermediate
    neither = int(not any(name in own for name in HALVES))
    gate = of(HALVES[0], neither, size, hidden)
    up = of(HALVES[1], 0, size, hidden)
    return {GATE_UP: join_gate_up(gate, up), DOWN: of(DOWN, 1, hidden, size)}


class StackedFile:
    """The stacked tensors of a file, and which of the ways to read them is meant."""

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        shape: ModelShape,
        rules: Rules,
        found: dict,
        order: ColumnOrder | None,
    ) -> None:
        """``path``: the weights; ``found``: (layer, what follows ``experts.``) -> factor -> (name,
        tensor); ``order``: what the user says of B."""
        self.path = path
        self.shape = shape
        self.rules = rules
        self.config = config
        self.version = str(config.get("peft_version") or "")
        self.order = order
        self.layers: dict[int, dict[str, Factors]] = defaultdict(dict)
        for (layer, which), factors in found.items():
            if factors.keys() != {"A", "B"}:
                raise ValueError(
                    f"{self.path}: {next(iter(factors.values()))[0]} has no partner (lora_A and"
                    " lora_B)"
                )
            a = factors["A"][1]
            b = factors["B"][1]
            if a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"{self.path}: {factors['A'][0]} has {a.shape[0]} rows, and its lora_B"
                    f" {b.shape[1]} columns"
                )
            self.layers[layer][which] = (a, b)

    def linears(self) -> Iterator[tuple[int, str, Factors, float]]:
        """``(layer, projection, factors, scale)`` of everything in the file."""
        for layer, tensors in self.layers.items():
            meaning, old = self._meaning(layer, tensors)
            for which, parameter in meaning.items():
                name = f"{experts_block(layer)}.{parameter}"
                factors = unpack(*tensors[which], self.shape.num_experts, self._order())
                scale = self.rules.scale(name, factors[0].shape[1], name)
                a, b = transposed(factors) if old else factors
                halves = split_gate_up(a, b) if parameter == GATE_UP else {DOWN: (a, b)}
                for projection, own in halves.items():
                    yield layer, projection, own, scale

    def _order(self) -> ColumnOrder:
        """As the user or Unsloth's own mark says, else PEFT's; what is Unsloth's and has no mark is
        refused."""
        mapping = self.config.get("auto_mapping") or {}
        said = self.order or self.config.get("lora_B_layout") or mapping.get("lora_B_layout")
        if said == "rank_major" or said == "grouped_by_expert":
            return said
        if said or mapping.get("unsloth_fixed"):
            raise ValueError(
                f"{self.path} was saved by Unsloth{f' with lora_B_layout={said}' if said else ''}:"
                " before 2026.9.6 it wrote the columns of B by expert, later in PEFT's order, with"
                " the same shapes. Say which, to megalora import: --lora-b-layout"
                " grouped_by_expert or rank_major"
            )
        return "rank_major"

    def _meaning(self, layer: int, tensors: dict[str, Factors]) -> tuple[dict[str, str], bool]:
        """Which tensor belongs to which parameter, and whether it is written as before PEFT
        0.19.1."""
        readings = []
        for meaning in _assignments(set(tensors)):
            for old in (False, True):
                if self._fits(tensors, meaning, old):
                    readings.append((meaning, old))
        if not readings:
            shapes = {}
            for which, factors in tensors.items():
                shapes[f"experts.{which}".rstrip(".")] = [tuple(t.shape) for t in factors]
            raise ValueError(
                f"{self.path}: the stacked tensors of layer {layer} are {shapes}, which no reading"
                f" fits to this base model's {self.shape.num_experts} experts of"
                f" {self.shape.hidden} x {self.shape.expert_intermediate}"
            )
        if len(readings) > 1 and not self.version:
            raise ValueError(
                f"{self.path}: the stacked tensors of layer {layer} have as many rows as columns,"
                " so that they can be read as PEFT before 0.19.1 wrote them and as later versions"
                " do, and the config has no peft_version. Load and save the adapter with the PEFT"
                " that trained it, 0.18 or newer"
            )
        # Square weights fit both ways: the version that wrote the file decides.
        newest_first = self.version and _numbers(self.version) >= (0, 19, 1)
        return readings[0 if newest_first else -1]

    def _fits(self, tensors: dict[str, Factors], meaning: dict[str, str], old: bool) -> bool:
        hidden = self.shape.hidden
        size = self.shape.expert_intermediate
        whole = {GATE_UP: (2 * size, hidden), DOWN: (hidden, size)}
        for which, parameter in meaning.items():
            a, b = tensors[which]
            if old not in orientations(a, b, *whole[parameter]):
                return False
            # A has as many rows for each expert.
            if a.shape[0] % self.shape.num_experts:
                return False
        return True


def _numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: 0, 19 and 1 of ``0.19.1.dev0``."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def _assignments(names: set[str]) -> list[dict[str, str]]:
    """Which parameters tensors of these names can be of; PEFT wraps one parameter, then the other
    around it. Shapes decide."""
    fixed = {name: name for name in names & {GATE_UP, DOWN}}
    nested = names - fixed.keys()
    if nested == {"", "base_layer"}:
        return [
            {"base_layer": GATE_UP, "": DOWN} | fixed,
            {"base_layer": DOWN, "": GATE_UP} | fixed,
        ]
    if nested == {""}:
        return [{"": p} | fixed for p in (GATE_UP, DOWN) if p not in fixed]
    return [fixed] if not nested else []
