"""Read any PEFT LoRA folder, whoever wrote it, into one form: an A and a B for every Hugging Face
linear, and its scale.

Names are read as ``hf/tensor_names.py`` says, stacked experts are taken apart as ``stacked.py`` and
``banks.py`` say, and weights of the base that PEFT saved are compared with it (``copies.py``). A
folder that is ambiguous or contradicts itself is rejected, with the name of the tensor or option.
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megalora.adapters.files import CONFIG, parts_of, read_config
from megalora.adapters.read.banks import BANKS, bank_factors, bank_linears, is_fused
from megalora.adapters.read.copies import check_copies, copies_in
from megalora.adapters.read.linears import Adapter, Linears
from megalora.adapters.read.named_tensors import checked, factor_of, score_of
from megalora.adapters.read.options import check_types, refuse_variants
from megalora.adapters.read.parts import together
from megalora.adapters.read.rules import Rules
from megalora.adapters.read.stacked import DOWN, GATE_UP, ColumnOrder, Factors, StackedFile
from megalora.adapters.read.weights import AdapterWeights
from megalora.adapters.read.whole import Whole, whole_of
from megalora.hf.tensor_names import (
    SCORE,
    TINKER_HEAD,
    FactorName,
    experts_block,
    is_training_only,
    parse_stack,
    parse_weight,
    weight_name,
)
from megalora.lora.modules import (
    expert_blocks,
    linear_modules,
    other_modules,
    parameters_of,
)
from megalora.lora.whole import trouble_beside
from megalora.model.shape import ModelShape

_STACKS = ("", "base_layer", GATE_UP, DOWN)
"""What follows ``experts`` in the name of a 2-D tensor for all experts of a layer."""

type Named = dict[FactorName, tuple[str, Tensor]]
"""Factor -> (name in the file, tensor)."""


def read_adapter(
    folder: Path,
    shape: ModelShape,
    order: ColumnOrder | None = None,
    base: Path | None = None,
    *,
    score: bool = False,
) -> Adapter:
    """Read a LoRA folder for a model of this shape; raises ``ValueError`` that says what in it
    cannot be meant.

    Args:
        order: how the columns of stacked B's run, where the file does not say it.
        base: the base's folder, with whose weights those that PEFT saved beside the factors are
            compared, if it has any.
        score: whether a score head in place of lm_head is read too, or refused.
    """
    if parts := parts_of(folder):
        return together(folder, [_read(part, shape, order, base) for part in parts])
    # Half an adapter would load like any other, and do half of what was trained.
    if others := AdapterWeights(folder).part_of:
        raise ValueError(
            f"{folder} is a part of an adapter, which is {others} together: put them beside each"
            f" other under those names and give the folder above, {folder.absolute().parent}"
        )
    return _read(folder, shape, order, base, score)


def _read(
    folder: Path, shape: ModelShape, order: ColumnOrder | None, base: Path | None,
    score: bool = False,
) -> Adapter:  # fmt: skip
    """``read_adapter`` of one folder, whether it is a whole adapter or a part."""
    config = read_config(folder)
    # First of all: what follows trusts that lists are lists.
    check_types(folder / CONFIG, config)
    refuse_variants(folder / CONFIG, config, score=score)
    weights = AdapterWeights(folder)
    heads = score_of(weights, config, shape)
    # Beside a score head nothing of lm_head may be in the folder.
    shape = replace(shape, num_scores=len(heads.get(weight_name(SCORE), ())))
    whole = Whole() if heads else whole_of(weights, config, shape)
    rules = Rules(folder, config, weights.where)
    copies = copies_in(weights, shape, whole.taken)
    notes = weights.notes + check_copies(weights, copies, shape, base)
    linears = Linears(weights, shape, rules)
    groups = _Groups(weights, shape)
    # Named, so that nobody looks for them in the result.
    if passed_over := [name for name in weights.info if is_training_only(name)]:
        notes.append(f"passed over, as PEFT needs them in training alone: {', '.join(passed_over)}")
    for name in weights.info:
        if name in copies or name in passed_over or name in whole.taken:
            continue
        # Read above, with the number of its labels.
        if heads and parse_weight(name) == SCORE:
            continue
        module, factor = factor_of(weights, name)
        if factor in ("M", "C"):
            add = linears.add_magnitude if factor == "M" else linears.add_bias
            add(module, name, checked(weights, name, 1))
            continue
        tensor = checked(weights, name, 3 if groups.is_bank(module) else 2)
        if not groups.take(module, factor, name, tensor):
            linears.add(module, factor, tensor, also=[TINKER_HEAD] if TINKER_HEAD in name else [])
    _put_groups(
        linears, groups, StackedFile(weights.where, config, shape, rules, groups.stacks, order)
    )
    rules.check_targets(linears.factors.keys(), _targetable(linears, shape))
    read = linears.adapter([*notes, *rules.notes()], heads | whole.tensors, config)
    read = replace(read, saved=whole.saved, tokens=whole.tokens, biases=whole.biases)
    if trouble := trouble_beside(read.adapted, read.shape_of(shape)):
        raise ValueError(f"{weights.where}: {trouble}")
    return read


def _targetable(linears: Linears, shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """Module -> its parameters, of all that an adapter's config may target."""
    known = {module: parameters_of(p, layer) for module, (p, layer, _) in linears.known.items()}
    return known | {module: (f"{module}.weight",) for module in other_modules(shape)}


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
        # Wrappers around a name can hide that two tensors are one.
        if factor in named:
            of = "experts" if place else "module"
            raise ValueError(
                f"{self.weights.path_of(name)}: {named[factor][0]} and {name} are lora_{factor} of"
                f" the same {of}"
            )
        named[factor] = (name, tensor)
        return True


def _put_groups(linears: Linears, groups: _Groups, stacked: StackedFile) -> None:
    for layer, projection, factors, scale in stacked.linears():
        linears.put(layer, projection, factors, scale)
    _put_banks(linears, groups.banks)
    _put_fused(linears, groups.fused)


def _put_banks(linears: Linears, banks: dict[tuple[int, str], Named]) -> None:
    for (layer, which), named in banks.items():
        a, b = _both(linears, named)
        names = f"{linears.where}: {named['A'][0]} and its lora_B"
        # One tensor of all experts: shapes say in which order its dimensions are.
        factors = bank_factors(names, which, a, b, linears.shape)
        own = f"{experts_block(layer)}.{which}"
        scale = linears.rules.scale(own, factors[0].shape[1], own)
        for projection, of_one in bank_linears(which, factors).items():
            linears.put(layer, projection, of_one, scale, [own, experts_block(layer)])


def _put_fused(linears: Linears, fused: dict[str, Named]) -> None:
    for module, named in fused.items():
        linears.add_fused(module, *_both(linears, named))


def _both(linears: Linears, named: Named) -> Factors:
    if named.keys() != {"A", "B"}:
        raise ValueError(
            f"{linears.where}: {next(iter(named.values()))[0]} has no partner (lora_A and lora_B)"
        )
    return named["A"][1], named["B"][1]
