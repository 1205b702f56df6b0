"""Make the computations that calibration times, as training runs them, on random operands.

Shape legend:
    M  rows    N  outputs    K  inputs    E  experts    S  sequence    B  sequences
    h  query heads    g  key/value heads    d  head dim
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from megalora_kernels import Routing
from megalora_kernels.backend import choose
from megalora_kernels.engine import Rows, Weight, make_engine

from megalora import host
from megalora.bench.calibrate_grid import Grid, coarse_first
from megalora.bench.clock import Call
from megalora.model.attention import DocumentAttention

COMPUTATIONS = ("gemm", "grouped_gemm", "attention", "memory")

USUAL_STACKED_RANK = 32
"""Rank of gate and up together, at 16 each: the back end of the experts depends on it."""


@dataclass(frozen=True)
class Case:
    """One size of one computation."""

    kind: str
    """One of ``COMPUTATIONS``, or a collective's name."""
    sizes: dict[str, int]
    """Sizes by their keys in the record."""
    num_bytes: int
    """Memory that operands, results and intermediate tensors take."""
    prepare: Callable[[], dict[str, Call]]
    """Makes operands; returns the calls to time, by their keys in the record."""
    collective: bool = False
    """Whether ranks wait for each other in it."""
    needed_by: int = 0
    """Place of the first layout of a config's plan that needs this size; 0 for one of the grid."""

    @property
    def series(self) -> tuple[str, int, int]:
        """The series of sizes that this case belongs to: its kind, and a collective's groups."""
        return self.kind, self.sizes.get("ranks", 0), self.sizes.get("nodes", 0)


def _random(*shape: int, dtype: torch.dtype, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=host.device(), requires_grad=requires_grad)


def gemm(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> Case:
    """``y = x Wᵀ``."""

    def prepare() -> dict[str, Call]:
        x_MK = _random(rows, inputs, dtype=dtype)
        w_NK = _random(outputs, inputs, dtype=dtype)
        return {"seconds": lambda: F.linear(x_MK, w_NK)}

    moved = dtype.itemsize * (rows * (outputs + inputs) + outputs * inputs)
    return Case("gemm", {"rows": rows, "outputs": outputs, "inputs": inputs}, moved, prepare)


def grouped_gemm(experts: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> Case:
    """``y = x W[e]ᵀ`` for the rows of each expert, which all have the same number of them, or one
    more.

    The back end is the one that a layer with a usual adapter takes on this device. Its weights have
    room for the adapter's columns where the back end uses that.
    """

    def prepare() -> dict[str, Call]:
        x_MK = _random(rows, inputs, dtype=dtype)
        w_ENK = _random(experts, outputs, inputs, dtype=dtype)
        # Expert e has the rows from ends[e - 1] to ends[e].
        numbers_E = torch.arange(1, experts + 1, dtype=torch.int32, device=x_MK.device)
        ends_E = numbers_E.long() * rows // experts
        routing = Routing(ends_E.int(), rows)
        backend = choose(None, "calibration", x_MK, rows, USUAL_STACKED_RANK, [w_ENK], room=True)
        # MEGALORA_BACKEND asks for the reference, which computes the base alone by a loop, too.
        if backend == "reference":
            backend = "loop"
        engine = make_engine(backend, routing)
        return {"seconds": lambda: engine.linear(Rows(x_MK), Weight(w_ENK), None)}

    moved = dtype.itemsize * (rows * (outputs + inputs) + experts * outputs * inputs)
    sizes = {"experts": experts, "rows": rows, "outputs": outputs, "inputs": inputs}
    return Case("grouped_gemm", sizes, moved, prepare)


def attention(
    sequences: int, sequence: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Case:
    """The model's core attention, forward and backward."""

    def prepare() -> dict[str, Call]:
        shape = (sequence, sequences)
        q_SBhd = _random(*shape, heads, head_dim, dtype=dtype, requires_grad=True)
        k_SBgd = _random(*shape, kv_heads, head_dim, dtype=dtype, requires_grad=True)
        v_SBgd = _random(*shape, kv_heads, head_dim, dtype=dtype, requires_grad=True)
        attend = DocumentAttention(SimpleNamespace(kv_channels=head_dim))
        out = attend(q_SBhd, k_SBgd, v_SBgd)
        dout = torch.randn_like(out)

        def backward() -> object:
            # The graph is kept, so that the same backward can be timed again and again.
            return torch.autograd.grad(out, (q_SBhd, k_SBgd, v_SBgd), dout, retain_graph=True)

        return {
            "forward_seconds": lambda: attend(q_SBhd, k_SBgd, v_SBgd),
            "backward_seconds": backward,
        }

    sizes = {
        "sequences": sequences,
        "sequence": sequence,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
    }
    held = _attention_bytes(sequences, sequence, heads, kv_heads, head_dim, dtype)
    return Case("attention", sizes, held, prepare)


def _attention_bytes(
    sequences: int, sequence: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """q, out, their gradients, copies in another order, dk and dv for every query head, dq in
    float32; k, v and their gradients.

    Where flash attention does not compute float32 (GPUs), six matrices of scores.
    """
    # Elements of one tensor: [S, B, h, d] of queries, [S, B, g, d] of keys and values.
    wide = sequences * sequence * heads * head_dim
    narrow = sequences * sequence * kv_heads * head_dim
    scores = 0
    if dtype == torch.float32 and host.device().type == "cuda":
        # [B, h, S, S].
        scores = sequences * heads * sequence**2
    # dq in float32, 4 bytes an element, comes on top.
    return dtype.itemsize * (10 * wide + 4 * narrow + 6 * scores) + 4 * wide


def memory_pass(num_bytes: int, dtype: torch.dtype) -> Case:
    """``y = a + b``: reads two tensors, writes one."""
    # Elements of each of the three.
    n = num_bytes // (3 * dtype.itemsize)

    def prepare() -> dict[str, Call]:
        a = _random(n, dtype=dtype)
        b = _random(n, dtype=dtype)
        return {"seconds": lambda: a + b}

    moved = 3 * n * dtype.itemsize
    return Case("memory", {"bytes": moved}, moved, prepare)


def compute_cases(grid: Grid, dtype: torch.dtype) -> list[list[Case]]:
    """All sizes of the grid of every kind that one rank computes alone, a coarse grid first."""
    gemms = []
    for m, (n, k) in coarse_first(grid.gemm_rows, grid.gemm_features):
        gemms.append(gemm(m, n, k, dtype))
    # Many experts with many rows each would be more than any rank ever gets.
    grouped = []
    for e, m, (n, k) in coarse_first(grid.experts, grid.rows_per_expert, grid.expert_features):
        if e * m <= grid.most_expert_rows:
            grouped.append(grouped_gemm(e, e * m, n, k, dtype))
    attentions = []
    axes = (grid.sequences, grid.sequence, grid.heads, grid.head_dim)
    for b, s, (h, g), d in coarse_first(*axes):
        if b * s <= grid.most_tokens:
            attentions.append(attention(b, s, h, g, d, dtype))
    passes = [memory_pass(num_bytes, dtype) for (num_bytes,) in coarse_first(grid.memory_bytes)]
    return [gemms, grouped, attentions, passes]
