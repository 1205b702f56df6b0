"""Collect the factors of an adapter folder by linear, and check that they fit the model and each
other."""

import difflib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megalora.adapters.files import CONFIG, PART_DORA
from megalora.adapters.read.banks import fused_linears
from megalora.adapters.read.rules import Rules
from megalora.adapters.read.stacked import Factors
from megalora.adapters.read.weights import AdapterWeights
from megalora.hf.tensor_names import (
    SCORE,
    FactorName,
    experts_block,
    tensor_name,
    weight_name,
)
from megalora.lora.modules import linear_modules, other_modules, other_names, parameters_of
from megalora.lora.select import ALIASES
from megalora.lora.spec import (
    PLAIN,
    WITH_BIAS,
    WITH_MAGNITUDE,
    Adapted,
    has_dora,
    make_adapted,
)
from megalora.model.projections import Projection, has_bias
from megalora.model.shape import ModelShape

_BY_OPTION: tuple[tuple[FactorName, str, str], ...] = (
    ("M", "magnitude", "use_dora"),
    ("C", "bias of B", "lora_bias"),
)
"""Factors that an option adds to every linear."""


@dataclass(frozen=True)
class Adapter:
    """What a folder adapts, and its tensors by their canonical names (``tensor_name``), every
    one of them there."""

    folder: Path
    adapted: list[Adapted]
    tensors: dict[str, Tensor]
    absent: list[str]
    """HF modules of experts that the file leaves out beside others of their layer; they stand in
    ``tensors`` as zeros."""
    notes: list[str] = field(default_factory=list)
    """What the folder holds beside the factors, a line each."""
    saved: tuple[str, ...] = ()
    """As ``ModelShape.saved``; their weights are among ``tensors``."""
    tokens: tuple[int, ...] = ()
    """As ``ModelShape.tokens``, likewise."""
    biases: tuple[str, ...] = ()
    """As ``ModelShape.biases``, likewise."""

    @property
    def num_scores(self) -> int:
        """Numbers that its score head gives; 0 where it has none."""
        return len(self.tensors.get(weight_name(SCORE), ()))

    def shape_of(self, base: ModelShape) -> ModelShape:
        """The base's sizes with the score head, and with what is trained of the base."""
        return replace(
            base, num_scores=self.num_scores, saved=self.saved, tokens=self.tokens,
            biases=self.biases,
        )  # fmt: skip


class Linears:
    """Factors by linear, as they come in, and the check that they fit the model and each other."""

    def __init__(self, weights: AdapterWeights, shape: ModelShape, rules: Rules) -> None:
        self.weights = weights
        self.shape = shape
        self.rules = rules
        self.where = weights.where
        self.known = linear_modules(shape)
        self.other_names = other_names(shape)
        self.factors: dict[str, dict[FactorName, Tensor]] = defaultdict(dict)
        self.scales: dict[str, float] = {}

    def add(self, module: str, factor: FactorName, tensor: Tensor, *, also: list[str]) -> None:
        """One factor of one linear. ``also``: other names by which the config may target it."""
        own = self.other_names.get(module, module)
        if own not in self.known:
            raise ValueError(f"{self.where}: {self._what_is(module)}")
        rank = tensor.shape[0 if factor == "A" else 1]
        self._check_shape(own, factor, tensor, rank)
        # PEFT compares patterns with the name that the file has.
        scale = self.rules.scale(self.rules.looked_up(module), rank, tensor_name(module, factor))
        self._keep(own, {factor: tensor}, scale, [*also, module])

    def add_magnitude(self, module: str, name: str, tensor: Tensor) -> None:
        """DoRA's magnitude of one linear, or of one expert's."""
        own = self.other_names.get(module, module)
        if own not in self.known or not has_dora(self.known[own][0]):
            raise ValueError(
                f"{self.where}: {name} is a magnitude, and megalora has DoRA on attention, MLPs,"
                " shared experts and each routed expert, under their own names"
            )
        self._check_shape(own, "M", tensor, 1)
        if "M" in self.factors[own]:
            raise ValueError(f"{self.where}: two tensors are the magnitude of {own}")
        # Float32 in training, whatever the file has.
        self.factors[own]["M"] = tensor.float()

    def add_bias(self, module: str, name: str, tensor: Tensor) -> None:
        """The bias of a B, of a linear that has a bias itself."""
        own = self.other_names.get(module, module)
        if own not in self.known or not has_bias(self.known[own][0], self.shape):
            raise ValueError(
                f"{self.where}: {name} is a bias of B (lora_bias), and {own} has none in this base"
                " that could take it in"
            )
        self._check_shape(own, "C", tensor, 1)
        if "C" in self.factors[own]:
            raise ValueError(f"{self.where}: two tensors are the bias of B of {own}")
        self.factors[own]["C"] = tensor

    def add_fused(self, module: str, a: Tensor, b: Tensor) -> None:
        """Gate and up of one MLP or one expert in one adapter."""
        rank = a.shape[0]
        scale = self.rules.scale(module, rank, tensor_name(module, "A"))
        for half, (own_a, own_b) in fused_linears(module, a, b).items():
            self._check_shape(half, "A", own_a, rank)
            self._check_shape(half, "B", own_b, rank)
            self._keep(half, {"A": own_a, "B": own_b}, scale, [module])

    def put(
        self,
        layer: int,
        role: str,
        factors: Factors,
        scale: float,
        also: list[str] | None = None,
    ) -> None:
        """All experts of one projection, from tensors that hold them all."""
        for expert, (a, b) in enumerate(zip(*factors, strict=True)):
            module = f"{experts_block(layer)}.{expert}.{role}"
            own = self.other_names.get(module, module)
            self._keep(own, {"A": a.contiguous(), "B": b.contiguous()}, scale, also or [])

    def _check_shape(self, module: str, factor: FactorName, tensor: Tensor, rank: int) -> None:
        projection, layer, _ = self.known[module]
        fits = make_adapted(projection, layer, rank, 0.0, 0.0, self.shape).shape(factor)
        if tuple(tensor.shape) != fits:
            raise ValueError(
                f"{self.where}: {tensor_name(module, factor)} is {tuple(tensor.shape)}, but this"
                f" base model and rank need {fits}"
            )

    def _keep(
        self, module: str, own: dict[FactorName, Tensor], scale: float, also: list[str]
    ) -> None:
        for factor in own:
            if factor in self.factors[module]:
                raise ValueError(f"{self.where}: two tensors are lora_{factor} of {module}")
        self.factors[module] |= own
        self.scales[module] = scale
        projection, layer, _ = self.known[module]
        self.rules.note([module, *also], parameters_of(projection, layer))

    def _what_is(self, module: str) -> str:
        """Of a module that is not adapted here: what it is instead."""
        leaf = module.rsplit(".", 1)[-1]
        if module in other_modules(self.shape):
            return (
                f"{module} has an adapter; megalora does not adapt it. Merge it with PEFT"
                " (merge_and_unload), or train without it"
            )
        if leaf in ALIASES:
            names = ", ".join(ALIASES[leaf])
            return (
                f"{module} is another stack's name for {names}, and the order of its rows is not in"
                " the file. Write an A and a B for each of them under their Hugging Face names"
            )
        close = difflib.get_close_matches(module, self.known, n=1)
        nearest = f"; the nearest is {close[0]}" if close else ""
        return f"{module} is not a linear layer of this base model{nearest}"

    def adapter(
        self, notes: list[str], heads: dict[str, Tensor], config: dict[str, Any]
    ) -> Adapter:
        """Everything that came in, as one adapter, if it fits together; ``heads`` go with it, and
        ``config`` says which linears have magnitudes."""
        adapted: list[Adapted] = []
        tensors: dict[str, Tensor] = {}
        absent: list[str] = []
        groups: dict[tuple[Projection, int | None], list[str]] = defaultdict(list)
        for module, (projection, layer, _) in self.known.items():
            if module in self.factors:
                groups[projection, layer].append(module)
        for (projection, layer), modules in groups.items():
            has_dora = bool(config.get("use_dora"))
            # Those that a magnitude came in for.
            if config["peft_type"] == PART_DORA:
                has_dora = any("M" in self.factors[module] for module in modules)
            wanted = WITH_MAGNITUDE if has_dora else PLAIN
            # PEFT itself refuses both together.
            if config.get("lora_bias"):
                wanted = WITH_BIAS
            a = self._one(projection, layer, modules, wanted)
            adapted.append(a)
            for module in a.hf_modules():
                # An expert without factors beside others that have some: zeros, and named.
                if module not in self.factors:
                    # With DoRA ``_one`` has refused this.
                    absent.append(module)
                for factor in a.factors:
                    tensors[tensor_name(module, factor)] = self._tensor(module, factor, a)
        if not adapted:
            raise ValueError(f"{self.where} holds no LoRA factor: it would be the base model")
        return Adapter(self.weights.folder, adapted, tensors | heads, absent, notes)

    def _one(
        self,
        projection: Projection,
        layer: int | None,
        modules: list[str],
        wanted: tuple[FactorName, ...],
    ) -> Adapted:
        ranks = set()
        scales = set()
        for module in modules:
            factors = self.factors[module]
            for present, lacking in (("A", "B"), ("B", "A")):
                if lacking not in factors:
                    raise ValueError(
                        f"{self.where} has lora_{present} of {module} and lacks its lora_{lacking}"
                    )
            for factor, what, option in _BY_OPTION:
                if (factor in factors) != (factor in wanted):
                    has = "has" if factor in factors else "lacks"
                    raise ValueError(
                        f"{self.where} {has} the {what} of {module}, and {option} in {CONFIG} is"
                        f" {'true' if factor in wanted else 'false'}"
                    )
            ranks.add(factors["A"].shape[0])
            scales.add(self.scales[module])
        if len(ranks) > 1 or len(scales) > 1:
            raise ValueError(
                f"{self.where}: experts of layer {layer} have different ranks or scales in"
                f" {projection.name} ({sorted(ranks)}; {sorted(scales)}); megalora and vLLM give"
                " one to all experts of a projection"
            )
        rank = ranks.pop()
        scale = scales.pop()
        a = make_adapted(projection, layer, rank, scale * rank, scale, self.shape, wanted)
        # Zeros would do nothing as an A and a B, but take away a weight as its magnitude.
        if "M" in wanted and len(modules) < len(a.hf_modules()):
            raise ValueError(
                f"{self.where} has {projection.name} of {len(modules)} of the"
                f" {len(a.hf_modules())} experts in layer {layer}; with DoRA all have magnitudes"
            )
        return a

    def _tensor(self, module: str, factor: FactorName, a: Adapted) -> Tensor:
        if module in self.factors:
            return self.factors[module][factor]
        any_tensor = next(iter(self.factors.values()))[factor]
        return any_tensor.new_zeros(a.shape(factor))
