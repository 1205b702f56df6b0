"""Experts with LoRA in plain torch: what vLLM's Triton kernels compute, for its CPU build, which
has no Triton.

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
    """All slots' factors. Slices' outputs lie side by side: (gate, up), or one that holds both."""

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
        token_N, choice_N = torch.where(experts_TK == expert)
        x_NH = x_TH[token_N]
        slot_N = slots_T[token_N]
        rows_of = {
            s: (slot_N == s).nonzero(as_tuple=True)[0]
            for s in torch.unique(slot_N).tolist()
            if s >= 0
        }
        h_NJ = F.linear(x_NH, gate_up_EJH[expert])
        for slot, rows in rows_of.items():
            h_NJ[rows] += _delta(x_NH[rows], slot, expert, factors.gate_up_a, factors.gate_up_b)
        gate_NI, up_NI = h_NJ.chunk(2, dim=-1)
        y_NI = F.silu(gate_NI) * up_NI
        out_NH = F.linear(y_NI, down_EHI[expert])
        for slot, rows in rows_of.items():
            out_NH[rows] += _delta(y_NI[rows], slot, expert, factors.down_a, factors.down_b)
        out_TH.index_add_(
            0, token_N, out_NH.float() * probs_TK[token_N, choice_N].float().unsqueeze(-1)
        )
    return out_TH


def _delta(x: Tensor, slot: int, expert: int, a_slices: Slices, b_slices: Slices) -> Tensor:
    parts = [
        F.linear(F.linear(x, a[slot, expert]), b[slot, expert])
        for a, b in zip(a_slices, b_slices, strict=True)
    ]
    return torch.cat(parts, dim=-1)
