"""Put the factors of a layer's experts one above the other."""

import torch
from torch import Tensor

from megalora.adapters.read.stacked import Factors
from megalora.hf.tensor_names import tensor_name
from megalora.lora.spec import Adapted


def share_outer(written: list[Adapted], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with experts' stacked and what they share kept once; raises ``ValueError`` where
    they do not share it."""
    tensors = dict(tensors)
    for a in written:
        if not a.projection.is_expert:
            continue
        # The outer side of an expert, H wide: A of gate and up, B of down.
        shared = "B" if a.projection.kind == "expert_row" else "A"
        where = a.hf_module(0).replace(".experts.0.", ".experts.")
        for factor, stack in zip(("A", "B"), factors_of(a, tensors), strict=True):
            if factor == shared:
                # Equal to the bit: an average would be another adapter.
                if not (stack == stack[:1]).all():
                    raise ValueError(
                        f"--layout shared_outer: the experts of layer {a.layer} have different"
                        f" {factor}s in {a.name}; this layout is for adapters whose experts share"
                        " them. Export with --layout per_expert"
                    )
                stack = stack[:1]
            tensors[tensor_name(where, factor)] = stack.contiguous()
        # The stacks stand for the experts' own matrices.
        for module in a.hf_modules():
            for factor in ("A", "B"):
                del tensors[tensor_name(module, factor)]
    return tensors


def factors_of(adapted: Adapted, tensors: dict[str, Tensor]) -> Factors:
    """A ``[E, r, in]`` and B ``[E, out, r]`` of all experts, or of the one linear, E = 1."""
    a = []
    b = []
    for expert in range(max(1, adapted.num_experts)):
        a.append(tensors[adapted.tensor_name("A", expert)])
        b.append(tensors[adapted.tensor_name("B", expert)])
    return torch.stack(a), torch.stack(b)
