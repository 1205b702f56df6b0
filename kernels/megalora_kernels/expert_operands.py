"""Check the operands of ``expert_mlp``: shapes, dtypes, devices, and that the base is frozen.

Shape legend: T tokens or rows of x   M routed rows   E experts   H hidden   I intermediate   J = 2I
"""

import torch

from .checks import check_base, check_placement
from .engine import Weight
from .expert_factors import ExpertFactors
from .routing import Routing


def check_operands(
    x_TH: torch.Tensor,
    weights: tuple[Weight, Weight],
    p_M: torch.Tensor,
    routing: Routing,
    adapters: tuple[ExpertFactors | None, ExpertFactors | None],
) -> None:
    """Raises ``ValueError`` where operands of ``expert_mlp`` do not fit each other.

    Args:
        weights: gate_up ``[E, 2I, H]`` and down ``[E, H, I]``.
        adapters: of gate_up and of down.
    """
    w1 = weights[0].like_ENK
    w2 = weights[1].like_ENK
    check_base("expert_mlp", x_TH, w1, routing.offsets_E)
    E, J, H = w1.shape
    if J % 2 or tuple(w2.shape) != (E, H, J // 2):
        raise ValueError(
            f"expert_mlp: gate_up is {(E, J, H)}, want [E, 2I, H]; down is {tuple(w2.shape)}, want"
            " [E, H, I]"
        )
    if w2.requires_grad:
        raise ValueError(
            "expert_mlp: down is frozen, but down.requires_grad is True; call"
            " down.requires_grad_(False)"
        )
    if (routing.source_M is None) != (routing.slots_TK is None):
        raise ValueError("expert_mlp: routing needs both source_M and slots_TK, or neither")
    if p_M.shape != (routing.num_rows,) or (
        routing.source_M is None and x_TH.shape[0] != routing.num_rows
    ):
        raise ValueError(
            f"expert_mlp: routing has M={routing.num_rows} rows, but p is {tuple(p_M.shape)} and x"
            f" {tuple(x_TH.shape)}"
        )
    check_placement("expert_mlp", x_TH, routing.offsets_E, gate_up=w1, down=w2)
    if p_M.dtype not in (torch.float32, x_TH.dtype):
        raise ValueError(f"expert_mlp: p is {p_M.dtype}, want torch.float32 or x's {x_TH.dtype}")
    if p_M.device != x_TH.device:
        raise ValueError(f"expert_mlp: p is on {p_M.device} but x is on {x_TH.device}")
    for name, weight, adapter in zip(("gate_up", "down"), weights, adapters, strict=True):
        if adapter is not None:
            weight.check_room(f"expert_mlp: {name}", adapter.a.shape[1])
            adapter.check(f"expert_mlp: {name}", weight.like_ENK)
            factors = {f"{name}.b[{i}]": b for i, b in enumerate(adapter.b)}
            check_placement(
                "expert_mlp", x_TH, routing.offsets_E, **{f"{name}.a": adapter.a}, **factors
            )
