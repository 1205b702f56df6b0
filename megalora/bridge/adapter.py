"""Any PEFT LoRA folder, whoever wrote it, in one form: an A and a B for every Hugging Face linear, and its scale.

Names are read as ``names.py`` says, stacked experts are taken apart as ``stacked.py`` says. What a folder leaves open, or
contradicts itself in, is refused; nothing is guessed.
"""

import difflib
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megalora.bridge.files import WEIGHTS, read_config
from megalora.bridge.names import parse
from megalora.bridge.rules import Rules, refuse_variants
from megalora.bridge.stacked import DOWN, GATE_UP, ColumnOrder, Factors, StackedFile
from megalora.lora.modules import linear_modules
from megalora.lora.spec import Adapted, FactorName, Projection, make_adapted, tensor_name
from megalora.model.shape import ModelShape

_STACK = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.experts(?:\.(?P<which>base_layer|gate_up_proj|down_proj))?")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Adapter:
    """What a folder adapts, and its tensors by their canonical names (``spec.tensor_name``), every one of them there."""

    folder: Path
    adapted: list[Adapted]
    tensors: dict[str, Tensor]
    absent: list[str]
    """HF modules of experts that the file leaves out beside others of their layer; they stand in ``tensors`` as zeros."""


def read_adapter(folder: Path, shape: ModelShape, order: ColumnOrder | None = None) -> Adapter:
    """Read a LoRA folder for a model of this shape; raises ``ValueError`` that says what in it cannot be meant.

    ``order``: how the columns of stacked B's run, where the file does not say it.
    """
    config = read_config(folder)
    refuse_variants(folder, config)
    rules, linears, stacks = Rules(folder, config), _Linears(folder, shape), {}
    for name, tensor in _load(folder / WEIGHTS).items():
        parsed = parse(name)
        if parsed is None:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} is no LoRA factor of a linear layer, which is all megalora reads"
            )
        module, factor = parsed
        if (match := _STACK.fullmatch(module)) and int(match["layer"]) in shape.moe_layers:
            stack = stacks.setdefault((int(match["layer"]), match["which"] or ""), {})
            if factor in stack:
                raise ValueError(
                    f"{folder / WEIGHTS}: {stack[factor][0]} and {name} are lora_{factor} of the same experts"
                )
            stack[factor] = (name, tensor)
        else:
            linears.add(module, factor, tensor, rules)
    for layer, projection, factors, scale in StackedFile(folder, config, shape, rules, stacks, order).linears():
        linears.put(layer, projection, factors, scale, rules)
    rules.check_targets(linears.factors.keys(), {module: parameters_of(module) for module in linears.known})
    return linears.adapter()


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if not tensors:
        raise ValueError(f"{path} holds no tensors: nothing was adapted, or saving went wrong")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or tensor.dim() != 2:
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; a factor is a matrix in float16, bfloat16, float32 or float64"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} has NaN or infinite values; the training that wrote it had diverged")
    return tensors


class _Linears:
    """Factors by linear, as they come in, and the check that they fit the model and each other."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self.folder, self.path, self.shape, self.known = folder, folder / WEIGHTS, shape, linear_modules(shape)
        self.factors: dict[str, dict[FactorName, Tensor]] = defaultdict(dict)
        self.scales: dict[str, float] = {}

    def add(self, module: str, factor: FactorName, tensor: Tensor, rules: Rules) -> None:
        if module not in self.known:
            close = difflib.get_close_matches(module, self.known, n=1)
            hint = f"; the nearest is {close[0]}" if close else ""
            raise ValueError(f"{self.path}: {module} is no linear layer of this base model{hint}")
        projection, layer, _ = self.known[module]
        rank = tensor.shape[0 if factor == "A" else 1]
        fits = make_adapted(projection, layer, rank, 0.0, 0.0, self.shape).shape(factor)
        if tuple(tensor.shape) != fits:
            raise ValueError(
                f"{self.path}: {tensor_name(module, factor)} is {tuple(tensor.shape)}, but this base model and rank need {fits}"
            )
        if factor in self.factors[module]:
            raise ValueError(f"{self.path}: two tensors are lora_{factor} of {module}")
        self.factors[module][factor] = tensor
        self.scales[module] = rules.scale(module, rank, tensor_name(module, factor))
        rules.note(module, layer, parameters_of(module))

    def put(self, layer: int, projection: str, factors: Factors, scale: float, rules: Rules) -> None:
        """All experts of one projection, from a stacked tensor."""
        for expert, (a, b) in enumerate(zip(*factors, strict=True)):
            module = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
            if module in self.factors:
                raise ValueError(f"{self.path}: {module} is there twice, on its own and in a stacked tensor")
            self.factors[module] = {"A": a.contiguous(), "B": b.contiguous()}
            self.scales[module] = scale
            rules.note(module, layer, parameters_of(module))

    def adapter(self) -> Adapter:
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
                absent += [] if module in self.factors else [module]
                for factor in ("A", "B"):
                    tensors[tensor_name(module, factor)] = self._tensor(module, factor, a)
        return Adapter(self.folder, adapted, tensors, absent)

    def _one(self, projection: Projection, layer: int | None, modules: list[str]) -> Adapted:
        ranks, scales = set(), set()
        for module in modules:
            factors = self.factors[module]
            for present, lacking in (("A", "B"), ("B", "A")):
                if lacking not in factors:
                    raise ValueError(f"{self.path} has lora_{present} of {module} and lacks its lora_{lacking}")
            ranks.add(factors["A"].shape[0])
            scales.add(self.scales[module])
        if len(ranks) > 1 or len(scales) > 1:
            raise ValueError(
                f"{self.path}: experts of layer {layer} have different ranks or scales in {projection.name} ({sorted(ranks)}; "
                f"{sorted(scales)}); megalora and vLLM give one to all experts of a projection"
            )
        rank, scale = ranks.pop(), scales.pop()
        return make_adapted(projection, layer, rank, scale * rank, scale, self.shape)

    def _tensor(self, module: str, factor: FactorName, a: Adapted) -> Tensor:
        if module in self.factors:
            return self.factors[module][factor]
        any_tensor = next(iter(self.factors.values()))[factor]
        return any_tensor.new_zeros(a.shape(factor))


def parameters_of(module: str) -> tuple[str, ...]:
    """As PEFT names them: the linear's own weight, or the fused parameter of which an expert's linear is a part."""
    match = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)", module)
    return (f"{match[1]}.{DOWN if match[2] == DOWN else GATE_UP}",) if match else (f"{module}.weight",)
