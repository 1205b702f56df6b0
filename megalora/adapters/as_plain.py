"""Write an adapter that was initialised from the base weights (PiSSA, OLoRA) as a LoRA for them.

    s (B A - B0 A0) = s [dB, B0] [A0 + dA; dA]        rank 2 r, alpha 2 s r

PEFT's ``path_initial_model_for_weight_conversion`` writes ``[B, -B0] [A; A0]``, the same function,
in which a bfloat16 file would lose small differences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megalora.lora.spec import FACTORS, PLAIN, Adapted, has_start

type Get = Callable[[str], Tensor]
"""Returns a tensor by name."""


def plain_form(adapted: Sequence[Adapted]) -> list[Adapted]:
    """The linears with A and B alone, of the rank that these have."""
    plain: list[Adapted] = []
    for a in adapted:
        if "A0" in a.factors:
            rank = a.product_rank
            # The scale is that of training, so that alpha grows with the rank.
            a = replace(a, rank=rank, alpha=a.scale * rank, factors=PLAIN)
        plain.append(a)
    return plain


def plain_source(adapted: Sequence[Adapted], get: Get) -> tuple[list[Adapted], Get]:
    """``plain_form``, and a function that returns its tensors by name, each made when it is asked
    for; an adapter without A0 and B0 as it is.

    Args:
        get: returns a trained tensor by name.
    """
    if not has_start(adapted):
        return list(adapted), get
    places: dict[str, tuple[Adapted, int, str]] = {}
    for a in adapted:
        if "A0" not in a.factors:
            continue
        for expert in range(max(1, a.num_experts)):
            for factor in ("A", "B"):
                places[a.tensor_name(factor, expert)] = (a, expert, factor)

    def plain(name: str) -> Tensor:
        own = get(name)
        if name not in places:
            return own
        a, expert, factor = places[name]
        # A's rows and B's columns are ranks.
        if factor == "A":
            start_a = get(a.tensor_name("A0", expert)).to(own.dtype)
            return torch.cat([start_a + own, own], dim=0)
        start_b = get(a.tensor_name("B0", expert)).to(own.dtype)
        return torch.cat([own, start_b], dim=1)

    return plain_form(adapted), plain


def as_plain(
    adapted: Sequence[Adapted], tensors: Mapping[str, Tensor]
) -> tuple[list[Adapted], dict[str, Tensor]]:
    """``plain_form`` and its tensors by name; an adapter without A0 and B0 as it is."""
    plain, get = plain_source(adapted, tensors.__getitem__)
    starts: set[str] = set()
    for a in adapted:
        for factor in a.factors:
            if not FACTORS[factor].trained:
                starts.update(a.tensor_name(factor, e) for e in range(max(1, a.num_experts)))
    return plain, {name: get(name) for name in tensors if name not in starts}
