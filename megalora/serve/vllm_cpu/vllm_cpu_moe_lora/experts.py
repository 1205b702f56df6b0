"""Compute experts with LoRA in plain torch, as vLLM's Triton kernels do, for its CPU build.

    h = x W1[e]^T + B1[s,e] A1[s,e] x     e: expert, s: the token's adapter slot; gate rows, then up
    y = silu(h_gate) * h_up
    out[t] = sum over k of p[t,k] * (y W2[e]^T + B2[s,e] A2[s,e] y)

Scales are in B already. Loops over experts and slots: made to be right, and fast enough for small
models on a CPU.

Shapes: T tokens, H hidden, I expert intermediate, E experts, K experts a token, S adapter slots, r
    rank of the slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Slices = tuple[Tensor, ...]


class Factors(NamedTuple):
    """All slots' factors. The outputs of slices lie side by side: (gate, up), or one for both."""

    gate_up_a: Slices
    """[S, E, r, H] each."""
    gate_up_b: Slices
    """[S, E, I, r] each."""
    down_a: Slices
    """[S, E, r, I]."""
    down_b: Slices
    """[S, E, H, r]."""


def apply_experts(
    x_TH: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    probs_TK: Tensor,
    experts_TK: Tensor,
    slots_T: Tensor,
    factors: Factors,
) -> Tensor:
    """Routed experts, each token with the adapter of its slot.

    Args:
        gate_up_EJH: J = 2 I, gate rows first.
        slots_T: a token's adapter slot; -1 for the bare base model.

    Returns: [T, H] float32, weighted and summed over the K experts.
    """
    out_TH = torch.zeros(x_TH.shape[0], down_EHI.shape[1], dtype=torch.float32, device=x_TH.device)
    for expert in torch.unique(experts_TK).tolist():
        # The N tokens that chose this expert, and as which of their K choices.
        token_N, choice_N = torch.where(experts_TK == expert)
        x_NH = x_TH[token_N]
        rows_of = _rows_of_slots(slots_T[token_N])
        h_NJ = F.linear(x_NH, gate_up_EJH[expert])
        for slot, rows in rows_of.items():
            h_NJ[rows] += _delta(x_NH[rows], slot, expert, factors.gate_up_a, factors.gate_up_b)
        gate_NI, up_NI = h_NJ.chunk(2, dim=-1)
        y_NI = F.silu(gate_NI) * up_NI
        out_NH = F.linear(y_NI, down_EHI[expert])
        for slot, rows in rows_of.items():
            out_NH[rows] += _delta(y_NI[rows], slot, expert, factors.down_a, factors.down_b)
        # In float32, because K contributions are summed.
        probs_N1 = probs_TK[token_N, choice_N].float().unsqueeze(-1)
        out_TH.index_add_(0, token_N, out_NH.float() * probs_N1)
    return out_TH


def _rows_of_slots(slot_N: Tensor) -> dict[int, Tensor]:
    """Rows of the tokens that have an adapter, by its slot."""
    rows_of = {}
    for slot in torch.unique(slot_N).tolist():
        # -1 is the bare base model.
        if slot >= 0:
            rows_of[slot] = (slot_N == slot).nonzero(as_tuple=True)[0]
    return rows_of


def _delta(x: Tensor, slot: int, expert: int, a_slices: Slices, b_slices: Slices) -> Tensor:
    """B A x of one adapter and expert, [rows, all slices' outputs]; the scale is in B."""
    parts = []
    for a, b in zip(a_slices, b_slices, strict=True):
        parts.append(F.linear(F.linear(x, a[slot, expert]), b[slot, expert]))
    return torch.cat(parts, dim=-1)
