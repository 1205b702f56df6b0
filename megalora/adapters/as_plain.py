"""Write an adapter that was initialised from the base weights (PiSSA, OLoRA) as a LoRA for them.

    s (B A - B0 A0) = s [dB, B0] [A0 + dA; dA]        rank 2 r, alpha 2 s r

PEFT's ``path_initial_model_for_weight_conversion`` writes ``[B, -B0] [A; A0]``, the same function,
in which a bfloat16 file would lose small differences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megalora.lora.spec import PLAIN, Adapted, has_start


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


def as_plain(
    adapted: Sequence[Adapted], tensors: Mapping[str, Tensor]
) -> tuple[list[Adapted], dict[str, Tensor]]:
    """``plain_form`` and its tensors by name; an adapter without A0 and B0 as it is."""
    if not has_start(adapted):
        return list(adapted), dict(tensors)
    plain = dict(tensors)
    for a in adapted:
        for expert in range(max(1, a.num_experts)):
            own = {factor: plain.pop(a.tensor_name(factor, expert)) for factor in a.factors}
            # A's rows and B's columns are ranks.
            start_a = own["A0"].to(own["A"].dtype)
            whole_a = torch.cat([start_a + own["A"], own["A"]], dim=0)
            whole_b = torch.cat([own["B"], own["B0"].to(own["B"].dtype)], dim=1)
            plain[a.tensor_name("A", expert)] = whole_a
            plain[a.tensor_name("B", expert)] = whole_b
    return plain_form(adapted), plain
