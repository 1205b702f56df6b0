"""Read any PEFT LoRA folder, whoever wrote it, into one form: an A and a B for every Hugging Face
linear, and its scale.

Names are read as ``hf/tensor_names.py`` says, stacked experts are taken apart as ``stacked.py`` and
``banks.py`` say, and weights of the base that PEFT saved are compared with it (``copies.py``). A
folder that is ambiguous or contradicts itself is rejected, with the name of the tensor or option.
"""

import difflib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megalora.adapters.files import CONFIG, read_config
from megalora.adapters.read.banks import BANKS, bank_factors, bank_linears, fused_linears, is_fused
from megalora.adapters.read.copies import check_copies, copies_in
from megalora.adapters.read.options import refuse_variants
from megalora.adapters.read.rules import Rules
from megalora.adapters.read.stacked import DOWN, GATE_UP, ColumnOrder, Factors, StackedFile
from megalora.adapters.read.weights import FLOATS, AdapterWeights
from megalora.hf.tensor_names import (
    TINKER_HEAD,
    FactorName,
    described,
    experts_block,
    is_training_only,
    module_before_factor,
    parse_factor,
    parse_stack,
    tensor_name,
)
from megalora.lora.modules import (
    expert_blocks,
    linear_modules,
    other_modules,
    other_names,
    parameters_of,
)
from megalora.lora.select import ALIASES
from megalora.lora.spec import Adapted, make_adapted
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape

_STACKS = ("", "base_layer", GATE_UP, DOWN)
"""What follows ``experts`` in the name of a 2-D tensor for all experts of a layer."""

type Named = dict[FactorName, tuple[str, Tensor]]
"""Factor -> (name in the file, tensor)."""


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


def read_adapter(
    folder: Path, shape: ModelShape, order: ColumnOrder | None = None, base: Path | None = None
) -> Adapter:
    """Read a LoRA folder for a model of this shape; raises ``ValueError`` that says what in it
    cannot be meant.

    Args:
        order: how the columns of stacked B's run, where the file does not say it.
        base: the base's folder, with whose weights those that PEFT saved beside the factors are
            compared, if it has any.
    """
    config = read_config(folder)
    refuse_variants(folder / CONFIG, config)
    weights = AdapterWeights(folder)
    rules = Rules(folder, config, weights.where)
    copies = copies_in(weights, shape)
    notes = weights.notes + check_copies(weights, copies, shape, base)
    linears = _Linears(weights, shape, rules)
    groups = _Groups(weights, shape)
    passed_over = [name for name in weights.info if is_training_only(name)]
    if passed_over:
        notes.append(f"passed over, as PEFT needs them in training alone: {', '.join(passed_over)}")
    for name in weights.info:
        if name in copies or name in passed_over:
            continue
        module, factor = _factor_of(weights, name)
        tensor = _checked(weights, name, 3 if groups.is_bank(module) else 2)
        if not groups.take(module, factor, name, tensor):
            linears.add(module, factor, tensor, also=[TINKER_HEAD] if TINKER_HEAD in name else [])
    stacked = StackedFile(weights.where, config, shape, rules, groups.stacks, order)
    for layer, projection, factors, scale in stacked.linears():
        linears.put(layer, projection, factors, scale)
    _put_banks(linears, groups.banks)
    _put_fused(linears, groups.fused)
    known = {module: parameters_of(p, layer) for module, (p, layer, _) in linears.known.items()}
    known |= {module: (f"{module}.weight",) for module in other_modules(shape)}
    rules.check_targets(linears.factors.keys(), known)
    return linears.adapter([*notes, *rules.notes()])


def _factor_of(weights: AdapterWeights, name: str) -> tuple[str, FactorName]:
    parsed = parse_factor(name)
    if parsed is not None:
        return parsed
    module = module_before_factor(name)
    where = (
        f"{weights.path_of(name)}: {name} is no LoRA factor of a linear layer, which is all"
        " megalora reads"
    )
    if ".lora_embedding_" in name:
        raise ValueError(
            f"{where}: {module} has an adapter; megalora does not adapt embeddings. Merge it with"
            " PEFT (merge_and_unload), or train without it"
        )
    raise ValueError(
        f"{where}: it is {described(name)}. Merge the adapter with PEFT (merge_and_unload), or"
        " train without"
    )


def _checked(weights: AdapterWeights, name: str, dims: int) -> Tensor:
    """The tensor, if it is a factor's: of floats, all finite, with so many dimensions or two."""
    info = weights.info[name]
    path = weights.path_of(name)
    if info.dtype not in FLOATS or len(info.shape) not in (2, dims):
        raise ValueError(
            f"{path}: {name} is {info.dtype} of shape {info.shape}; a factor is a matrix in"
            f" {', '.join(FLOATS)}"
        )
    tensor = weights.tensor(name)
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{path}: {name} has NaN or infinite values; the training that wrote it had diverged"
        )
    return tensor


class _Groups:
    """Tensors that hold the factors of several linears, as they come in."""

    def __init__(self, weights: AdapterWeights, shape: ModelShape) -> None:
        self.weights = weights
        self.blocks = expert_blocks(shape)
        self.known = linear_modules(shape)
        self.stacks: dict[tuple[int, str], Named] = {}
        """(layer, what follows ``experts.``) -> 2-D tensors for all experts."""
        self.banks: dict[tuple[int, str], Named] = {}
        """The same for 3-D tensors."""
        self.fused: dict[str, Named] = {}
        """Module -> the factors of its gate and up in one."""

    def is_bank(self, module: str) -> bool:
        """Whether the name is one that 3-D tensors have."""
        place = parse_stack(module)
        return place is not None and place[1] in BANKS

    def take(self, module: str, factor: FactorName, name: str, tensor: Tensor) -> bool:
        """Keep the tensor if it is such a one."""
        place = parse_stack(module)
        if place is not None and place[0] in self.blocks:
            block, which = place
            if tensor.dim() == 2 and which not in _STACKS:
                raise ValueError(
                    f"{self.weights.path_of(name)}: {name} is {tuple(tensor.shape)}; a tensor for"
                    " all experts of this name is 3-D (E, rank, in), and a 2-D one is called"
                    " experts or experts.base_layer. Write an A and a B for each expert,"
                    " experts.N.gate_proj and so on"
                )
            group = self.stacks if tensor.dim() == 2 else self.banks
            named = group.setdefault((self.blocks[block], which), {})
        elif is_fused(module) and module.replace(GATE_UP, "gate_proj") in self.known:
            named = self.fused.setdefault(module, {})
        else:
            return False
        if factor in named:
            of = "experts" if place else "module"
            raise ValueError(
                f"{self.weights.path_of(name)}: {named[factor][0]} and {name} are lora_{factor} of"
                f" the same {of}"
            )
        named[factor] = (name, tensor)
        return True


class _Linears:
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

    def adapter(self, notes: list[str]) -> Adapter:
        """Everything that came in, as one adapter, if it fits together."""
        adapted: list[Adapted] = []
        tensors: dict[str, Tensor] = {}
        absent: list[str] = []
        groups: dict[tuple[Projection, int | None], list[str]] = defaultdict(list)
        for module, (projection, layer, _) in self.known.items():
            if module in self.factors:
                groups[projection, layer].append(module)
        for (projection, layer), modules in groups.items():
            a = self._one(projection, layer, modules)
            adapted.append(a)
            for module in a.hf_modules():
                # An expert without factors beside others that have some: zeros, and named.
                if module not in self.factors:
                    absent.append(module)
                for factor in ("A", "B"):
                    tensors[tensor_name(module, factor)] = self._tensor(module, factor, a)
        if not adapted:
            raise ValueError(f"{self.where} holds no LoRA factor: it would be the base model")
        return Adapter(self.weights.folder, adapted, tensors, absent, notes)

    def _one(self, projection: Projection, layer: int | None, modules: list[str]) -> Adapted:
        ranks = set()
        scales = set()
        for module in modules:
            factors = self.factors[module]
            for present, lacking in (("A", "B"), ("B", "A")):
                if lacking not in factors:
                    raise ValueError(
                        f"{self.where} has lora_{present} of {module} and lacks its lora_{lacking}"
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
        return make_adapted(projection, layer, rank, scale * rank, scale, self.shape)

    def _tensor(self, module: str, factor: FactorName, a: Adapted) -> Tensor:
        if module in self.factors:
            return self.factors[module][factor]
        any_tensor = next(iter(self.factors.values()))[factor]
        return any_tensor.new_zeros(a.shape(factor))


def _put_banks(linears: _Linears, banks: dict[tuple[int, str], Named]) -> None:
    for (layer, which), named in banks.items():
        a, b = _both(linears, named)
        names = f"{linears.where}: {named['A'][0]} and its lora_B"
        factors = bank_factors(names, which, a, b, linears.shape)
        own = f"{experts_block(layer)}.{which}"
        scale = linears.rules.scale(own, factors[0].shape[1], own)
        for projection, of_one in bank_linears(which, factors).items():
            linears.put(layer, projection, of_one, scale, [own, experts_block(layer)])


def _put_fused(linears: _Linears, fused: dict[str, Named]) -> None:
    for module, named in fused.items():
        linears.add_fused(module, *_both(linears, named))


def _both(linears: _Linears, named: Named) -> Factors:
    if named.keys() != {"A", "B"}:
        raise ValueError(
            f"{linears.where}: {next(iter(named.values()))[0]} has no partner (lora_A and lora_B)"
        )
    return named["A"][1], named["B"][1]
