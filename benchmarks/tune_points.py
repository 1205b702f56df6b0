"""Say what the sweep measures: grouped GEMMs of real layers, their operands and right results.

Shape legend: M routed rows   T tokens   E experts   K inputs   N outputs   R rank of all blocks
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from megalora_kernels import Routing
from megalora_kernels.gemm_kernel import grouped_gemm_triton
from megalora_kernels.variants import Product, Variant
from torch import Tensor

from benchmarks.expert_case import ALLOWED, SIZES, Sizes, Spec

RANK = 16
"""Rank of the adapters on gate, up and down; gate_up has those of two stacked."""
TOP_K = 8
"""Experts of a token, in both models."""
UNEVEN = (0, 1, 63, 64, 127, 129, 300, 257, 0, 31, 128, 255, 2, 0, 65, 16)
"""Rows of each expert where variants are checked first: none, one, and one less and more than a
tile of 64, 128 or 256. 16 experts, as in what is timed: Triton compiles a kernel anew for integers
that 16 does not divide."""
UNEVEN_DRY = (0, 1, 17, 0)


@dataclass(frozen=True)
class Gemm:
    """One grouped GEMM of a layer as training runs it, with adapters."""

    name: str
    op: Literal["forward", "dgrad"]
    N: int
    K: int
    ranks: tuple[int, ...]
    """Rank of each block of N; gate and up are two blocks forward and one in the gradient of their
    input."""
    gathered: bool

    def product(self, dtype: torch.dtype, rows_per_expert: float) -> Product:
        return Product(
            self.op,
            dtype,
            self.N,
            self.K,
            sum(self.ranks),
            self.gathered,
            rows_per_expert,
            len(self.ranks),
        )


@dataclass(frozen=True)
class Point:
    """A GEMM with so many experts on this rank, and so many rows for each."""

    gemm: Gemm
    experts: int
    rows: int

    @property
    def label(self) -> str:
        return f"{self.gemm.name} {self.experts} x {self.rows}"

    def flops(self) -> int:
        return 2 * self.experts * self.rows * self.gemm.N * self.gemm.K


@dataclass(frozen=True)
class Group:
    """What is compiled, then measured together."""

    points: tuple[Point, ...]
    layers: tuple[Spec, ...] = ()
    """Whole layers, to be timed by Triton and by torch's grouped GEMM, from many rows per expert to
    few."""


def gemms_of(sizes: Sizes, rank: int = RANK) -> tuple[Gemm, ...]:
    """The four GEMMs of a layer's experts, forward and for the gradients of their inputs."""
    hidden = sizes.hidden
    inner = sizes.inner
    # Rows are gathered where tokens are read, and where the gradient of their output is: the GEMM
    # sorts them by expert as it loads them.
    return (
        Gemm(f"{sizes.name} gate_up forward", "forward", 2 * inner, hidden, (rank, rank), True),
        Gemm(f"{sizes.name} down forward", "forward", hidden, inner, (rank,), False),
        Gemm(f"{sizes.name} down dgrad", "dgrad", inner, hidden, (rank,), True),
        Gemm(f"{sizes.name} gate_up dgrad", "dgrad", hidden, 2 * inner, (2 * rank,), False),
    )


FIRST = ((128, 512), (16, 4096))
"""(experts, rows per expert): 8k tokens, all experts on one GPU, or one of 8 expert-parallel
ranks."""
REST = ((128, 256), (16, 2048), (128, 1024), (16, 8192), (128, 128), (128, 64))
MANY_ROWS = ((16, 4096), (16, 2048), (16, 1024))
FEWER_ROWS = ((128, 512), (128, 256), (128, 128))
"""The same for whole layers: torch's GEMM wins at many rows if at all, so the crossing is looked
for from many rows down."""


def groups() -> list[Group]:
    """All groups, the most valuable first: time may run out."""
    thirty = SIZES["30b"]
    big = SIZES["235b"]
    return [
        _group(thirty, FIRST, MANY_ROWS),
        _group(thirty, REST, FEWER_ROWS),
        _group(big, (*FIRST, *REST), (*MANY_ROWS, *FEWER_ROWS)),
    ]


def _group(
    sizes: Sizes, gemms_at: Sequence[tuple[int, int]], layers_at: Sequence[tuple[int, int]]
) -> Group:
    points = []
    for experts, rows in gemms_at:
        for gemm in gemms_of(sizes):
            points.append(Point(gemm, experts, rows))
    specs = []
    for experts, rows in layers_at:
        # A token has a row in each of its experts.
        num_tokens = rows * experts // TOP_K
        specs.append(Spec(sizes, num_tokens, experts, RANK, "balanced"))
    return Group(tuple(points), tuple(specs))


def dry_groups() -> list[Group]:
    """The same path in seconds on a CPU."""
    sizes = Sizes("dry", 64, 32, num_experts=4, top_k=2)
    gate_up, down, _, dgrad = gemms_of(sizes, rank=4)
    points = (Point(gate_up, 2, 20), Point(down, 2, 20), Point(dgrad, 2, 20))
    return [Group(points, (Spec(sizes, 8, 4, 4, "balanced"),))]


@dataclass(frozen=True)
class Operands:
    """Operands of one grouped GEMM; the weight as it is stored, so that strides are those of
    training."""

    x: Tensor
    w_EKN: Tensor
    routing: Routing
    s_MR: Tensor
    b: tuple[Tensor, ...]
    """The adapter's second factor for each of n blocks, ``[E, R_i, N / n]``."""
    source_M: Tensor | None
    """Token of each row; None: rows are read as they lie."""


Launch = Callable[[Operands, Variant], Tensor]


def launch(o: Operands, variant: Variant) -> Tensor:
    """The product ``[M, N]`` by one variant."""
    return grouped_gemm_triton(o.x, o.w_EKN, o.routing, o.s_MR, o.b, o.source_M, variant=variant)


def make_operands(
    gemm: Gemm,
    counts: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    filled: bool = True,
) -> Operands:
    """Operands for ``counts[e]`` rows of expert e.

    Args:
        filled: with random numbers, never zeros, which cost a GPU less power; else as they were
            found, for compiling.
    """
    g = torch.Generator(device).manual_seed(seed)
    E = len(counts)
    M = sum(counts)
    N = gemm.N
    K = gemm.K
    R = sum(gemm.ranks)
    # As many tokens as have so many rows: what is read again and again comes from L2.
    T = max(1, M // TOP_K) if gemm.gathered else M

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        t = torch.empty(*shape, device=device, dtype=dtype)
        return t.normal_(std=size, generator=g) if filled else t

    # Weights are stored ``[E, outputs, inputs]``. Forward multiplies by the transpose; the gradient
    # of the input, whose N are the layer's inputs, by the weight as it lies.
    forward = gemm.op == "forward"
    w = normal(E, N, K, size=K**-0.5) if forward else normal(E, K, N, size=K**-0.5)
    blocks = []
    for rank in gemm.ranks:
        width = N // len(gemm.ranks)
        # Forward b is a transposed B [E, N, r]; in the input's gradient it is A [E, R, N].
        factor = normal(E, width, rank).transpose(1, 2) if forward else normal(E, rank, width)
        blocks.append(factor)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    source = None
    if gemm.gathered:
        source = torch.randint(T, (M,), device=device, generator=g, dtype=torch.int32)
    return Operands(
        x=normal(T, K), w_EKN=w.transpose(1, 2) if forward else w, routing=Routing(ends, M),
        s_MR=normal(M, R, size=R**-0.5), b=tuple(blocks), source_M=source,
    )  # fmt: skip


def reference(o: Operands) -> Tensor:
    """The product in float32, expert after expert, by plain products."""
    y_MN = torch.empty(o.routing.num_rows, o.w_EKN.shape[2], device=o.x.device)
    x_MK = o.x if o.source_M is None else o.x[o.source_M.long()]
    for e, i, j in o.routing.spans():
        y_MN[i:j] = x_MK[i:j].float() @ o.w_EKN[e].float()
        # Each block of outputs has its own ranks of S: gate's and up's stand side by side.
        first_rank = 0
        first_column = 0
        for b_ErN in o.b:
            _, rank, width = b_ErN.shape
            s = o.s_MR[i:j, first_rank : first_rank + rank].float()
            y_MN[i:j, first_column : first_column + width] += s @ b_ErN[e].float()
            first_rank += rank
            first_column += width
    return y_MN


def mistake(o: Operands, want_MN: Tensor, variant: Variant, run: Launch = launch) -> str | None:
    """Why a variant may not be timed, or None: rows that differ from float32, or other bits in a
    second run.

    Memory that it allocates is filled with NaN, so that an entry that it does not write shows. Rows
    are compared one by one: in the norm of the whole, one wrong row in a hundred thousand is lost.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what is allocated
    try:
        y_MN = run(o, variant)
        again_MN = run(o, variant)
    finally:
        torch.use_deterministic_algorithms(before)
    allowed = ALLOWED[o.x.dtype]
    error_M = (y_MN.float() - want_MN).norm(dim=1) / want_MN.norm(dim=1)
    worst = float(error_M.nan_to_num(nan=torch.inf).max())
    if not worst <= allowed:
        wrong = int((~(error_M <= allowed)).sum())
        return (
            f"wrong: {wrong} of {error_M.numel()} rows differ from float32, by {worst:.1e} at most"
        )
    if not torch.equal(y_MN, again_MN):
        return "wrong: other bits in a second run"
    return None


def variant_label(v: Variant) -> str:
    """``128x256x64 w8 s4 w:tma x:pointers``."""
    tile = f"{v.block_m}x{v.block_n}x{v.block_k} w{v.num_warps} s{v.num_stages}"
    label = f"{tile} w:{v.weight} x:{v.rows}"
    return f"{label} persistent" if v.persistent else label
