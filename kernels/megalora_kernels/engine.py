"""The steps of an expert, computed by one back end or another.

    loop         one GEMM per expert from the host, which reads the offsets; any device and dtype
    grouped_mm   torch's grouped GEMM (CUTLASS on Hopper), on joined operands where the weight has
                 room for the adapter; passes between GEMMs in Triton on a GPU, in torch on a CPU
    triton       everything in Triton; rows are gathered as they are read, never written permuted

Shape legend: T source rows   M routed rows   E experts   K inputs   N outputs   R rank
I expert intermediate   J = 2I
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .augmented_weight import AugmentedWeight
from .coded_gemm import coded_gemm_triton, in_load
from .coded_weight import CodedWeight
from .combine import combine_ref, combine_triton
from .expert_factors import UNSCALED, Factors, RankScale
from .gemm_kernel import grouped_gemm_triton
from .grouped_gemm import (
    add_delta_vendor,
    aligned,
    columns_and_ranks,
    grouped_gemm_loop,
    grouped_gemm_vendor,
    padded_rank,
)
from .lora_wgrad import lora_wgrad_loop, lora_wgrad_triton
from .routing import Routing
from .row_gain import (
    gain_gradient_loop,
    gain_gradient_triton,
    gain_rows_loop,
    gain_rows_triton,
)
from .shrink import shrink_loop, shrink_triton
from .sums import Shapes, Sums, TorchSums, TritonSums
from .swiglu import swiglu_loop, swiglu_triton
from .swiglu_backward import swiglu_backward_loop, swiglu_backward_triton


@dataclass
class Rows:
    """Operand of a grouped GEMM: rows, and what goes through the adapter beside them."""

    x: torch.Tensor
    source_M: torch.Tensor | None = None
    """Row m is ``x[source[m]]``; None: ``x[m]``."""
    s_MR: torch.Tensor | None = None
    joined: torch.Tensor | None = None
    """``[x | s]`` in one buffer ``[M, K + R]``, of which x and s are views."""


@dataclass(frozen=True)
class Weight:
    """Frozen ``[E, N, K]``: a tensor, or one that perhaps has room for an adapter and perhaps is
    decoded when its values are asked for."""

    given: torch.Tensor | AugmentedWeight

    @property
    def joined(self) -> AugmentedWeight | None:
        """The weight with room for an adapter; None without room."""
        if isinstance(self.given, AugmentedWeight) and self.given.room:
            return self.given
        return None

    @property
    def like_ENK(self) -> torch.Tensor:
        """Sizes, strides, dtype and device of the weight; the values are any."""
        return self.given.like if isinstance(self.given, AugmentedWeight) else self.given

    @property
    def w_ENK(self) -> torch.Tensor:
        """The values. Where they are decoded they are valid until the next weight is."""
        return self.given.weight if isinstance(self.given, AugmentedWeight) else self.given

    def own_copy(self) -> torch.Tensor:
        """The values, in memory that autograd may keep."""
        return self.given.own_copy() if isinstance(self.given, AugmentedWeight) else self.given

    @property
    def kept(self) -> torch.Tensor | None:
        """What autograd saves of it: nothing where it is asked for again in backward."""
        return None if isinstance(self.given, AugmentedWeight) else self.given

    @property
    def not_kept(self) -> AugmentedWeight | None:
        """What is asked for again in backward; writing an adapter beside it counts as changing
        it, so that autograd cannot save it."""
        return self.given if isinstance(self.given, AugmentedWeight) else None

    def check_room(self, what: str, rank: int) -> None:
        """Raises ``ValueError`` where an adapter of this rank does not fit beside the weight."""
        if self.joined is not None and rank > self.joined.room:
            raise ValueError(
                f"{what}: the adapter's rank is {rank}, but the weight has room for"
                f" {self.joined.room}"
            )


@dataclass(frozen=True)
class Passes:
    """The steps that are bound by memory, each in one pass."""

    shrink: Callable[..., None]
    swiglu: Callable[..., None]
    swiglu_backward: Callable[..., None]
    wgrad: Callable[..., None]
    gain_rows: Callable[..., None]
    gain_gradient: Callable[..., None]
    combine: Callable[..., torch.Tensor]
    sums: type[TorchSums] | type[TritonSums]


IN_TORCH = Passes(
    shrink_loop,
    swiglu_loop,
    swiglu_backward_loop,
    lora_wgrad_loop,
    gain_rows_loop,
    gain_gradient_loop,
    combine_ref,
    TorchSums,
)
IN_TRITON = Passes(
    shrink_triton,
    swiglu_triton,
    swiglu_backward_triton,
    lora_wgrad_triton,
    gain_rows_triton,
    gain_gradient_triton,
    combine_triton,
    TritonSums,
)


class Engine:
    """Computes the steps for one routing, tensors in, tensors out; no autograd.

    This class is ``loop`` with ``IN_TORCH`` and ``triton`` with ``IN_TRITON``: both gather rows as
    they read them.
    """

    def __init__(self, routing: Routing, passes: Passes, gemm: Callable[..., torch.Tensor]) -> None:
        self.routing = routing
        self.passes = passes
        self.gemm = gemm

    def dense(self, t: torch.Tensor) -> torch.Tensor:
        """t with rows that the kernels can read."""
        # Kernels step along rows; plain torch takes any strides.
        return t if t.stride(-1) == 1 or self.passes is IN_TORCH else t.contiguous()

    def buffers(self, like: torch.Tensor, features: int, rank: int, weight: Weight) -> Rows:
        """Room for M rows and for what goes beside them."""
        x_MK = like.new_empty(self.routing.num_rows, features)
        return Rows(x_MK, s_MR=like.new_empty(self.routing.num_rows, rank) if rank else None)

    def shrink(
        self, x: torch.Tensor, factors: Factors | None, weight: Weight,
        source_M: torch.Tensor | None = None,
        x_lora: torch.Tensor | None = None, scale: RankScale = UNSCALED,
    ) -> Rows:  # fmt: skip
        """x as an operand, with S beside it: x, or ``x_lora`` where that is given, times its
        factors and scale."""
        x = self.dense(x)
        if factors is None:
            return Rows(x, source_M)
        s_MR = x.new_empty(self.routing.num_rows, _rank_of(factors))
        x_lora = x if x_lora is None else self.dense(x_lora)
        self.passes.shrink(x_lora, factors, self.routing, s_MR, source_M, scale=scale)
        return Rows(x, source_M, s_MR)

    def linear(self, rows: Rows, weight: Weight, b: Factors | None) -> torch.Tensor:
        """``x Wᵀ + s Bᵀ``, one Bᵀ ``[E, r, N / len(b)]`` for each block of the weight's rows."""
        codes = weight.given.codes if isinstance(weight.given, CodedWeight) else None
        if codes and self.gemm is grouped_gemm_triton and in_load(codes, self.routing):
            # Few rows: from the codes themselves, and nothing is decoded into memory.
            return coded_gemm_triton(rows.x, codes, self.routing, rows.s_MR, b, rows.source_M)
        return self.product(rows, weight.w_ENK.transpose(1, 2), b)

    def dgrad(self, rows: Rows, weight: Weight, a_ERK: torch.Tensor | None) -> torch.Tensor:
        """``dy W + ds A`` for ``rows = (dy, ds)``."""
        return self.product(rows, weight.w_ENK, None if a_ERK is None else (a_ERK,))

    def product(self, rows: Rows, w_EKN: torch.Tensor, factors: Factors | None) -> torch.Tensor:
        """``x @ w[e] + s @ factors[e]``, block by block of columns."""
        return self.gemm(rows.x, w_EKN, self.routing, rows.s_MR, factors, rows.source_M)

    def from_rank(self, s_MR: torch.Tensor, factor_ERN: torch.Tensor) -> torch.Tensor:
        """``s @ factor[e]`` alone."""
        return self.gemm(self.dense(s_MR), factor_ERN, self.routing)

    def swiglu(
        self, y_MJ: torch.Tensor, p_M: torch.Tensor, a_EQI: torch.Tensor | None, weight: Weight,
        scale: RankScale = UNSCALED,
    ) -> Rows:  # fmt: skip
        """silu(gate) up p, with S of down beside it."""
        rows = self.buffers(
            y_MJ, y_MJ.shape[1] // 2, 0 if a_EQI is None else a_EQI.shape[1], weight
        )
        self.passes.swiglu(y_MJ, p_M, a_EQI, self.routing, rows.x, self._padded(rows), scale.first)
        return rows

    def swiglu_backward(
        self, dh_MI: torch.Tensor, y_MJ: torch.Tensor, p_M: torch.Tensor, s_MR: torch.Tensor | None,
        blocks: Factors | None, ds_MQ: torch.Tensor | None, weight: Weight,
        sums: Sums, da: torch.Tensor | None, db: Sequence[torch.Tensor | None],
        scale: RankScale = UNSCALED,
    ) -> Rows:  # fmt: skip
        """(dy, dS) of gate_up. The gradients of probabilities, A of down and B of gate_up go to
        ``sums`` and places there."""
        # dy is as wide as y: gate's half, then up's.
        rows = self.buffers(y_MJ, y_MJ.shape[1], 0 if s_MR is None else s_MR.shape[1], weight)
        self.passes.swiglu_backward(
            dh_MI, y_MJ, p_M, self.routing, rows.x, s_MR, ds_MQ, sums, da, db
        )
        # Behind dy itself, of which it is a product.
        if blocks is not None:
            self.shrink_beside(rows, blocks, scale)
        return rows

    def shrink_beside(self, rows: Rows, factors: Factors, scale: RankScale) -> None:
        """Fill S beside rows that are there."""
        self.passes.shrink(rows.x, factors, self.routing, self._padded(rows), scale=scale)

    def _padded(self, rows: Rows) -> torch.Tensor | None:
        """S with the columns that pad it."""
        if rows.joined is None:
            # Without one buffer there is no padding to fill.
            return rows.s_MR
        return rows.joined[:, rows.x.shape[1] :]

    def sums(self, like: torch.Tensor, shapes: Shapes) -> Sums:
        """Places for the gradients of one backward pass, as few launches as they need; see
        ``sums.py``."""
        return self.passes.sums(self.routing, like, shapes)

    def wgrad(
        self,
        g_MR: torch.Tensor,
        x: torch.Tensor,
        place: torch.Tensor | None,
        source_M: torch.Tensor | None = None,
    ) -> None:
        """``gᵀ x`` of each expert's rows, ``[R, K]``, into a place of ``sums``."""
        assert place is not None
        self.passes.wgrad(self.dense(g_MR), self.dense(x), self.routing, place, source_M)

    def combine(self, y_MH: torch.Tensor) -> torch.Tensor:
        """Each token's sum; y itself where rows are given and taken sorted."""
        slots_TK = self.routing.slots_TK
        return y_MH if slots_TK is None else self.passes.combine(y_MH, slots_TK)


class VendorEngine(Engine):
    """``grouped_mm``: operands in order and joined, for torch's grouped GEMM."""

    def __init__(self, routing: Routing, passes: Passes) -> None:
        super().__init__(routing, passes, grouped_gemm_vendor)
        if routing.offsets_E.device.type == "cpu":
            _ = routing.bounds  # a check that is free there

    def buffers(self, like: torch.Tensor, features: int, rank: int, weight: Weight) -> Rows:
        num_rows = self.routing.num_rows
        pad = padded_rank(rank, like.dtype) if rank else 0
        # Nothing goes beside the rows, so they need not be joined.
        if rank == 0:
            return Rows(like.new_empty(num_rows, features))
        if weight.joined is None:
            return Rows(
                like.new_empty(num_rows, features), s_MR=like.new_empty(num_rows, pad)[:, :rank]
            )
        pad = weight.joined.room  # a weight may have more room than this adapter needs
        joined = like.new_empty(num_rows, features + pad)
        return Rows(joined[:, :features], None, joined[:, features : features + rank], joined)

    def shrink(
        self, x: torch.Tensor, factors: Factors | None, weight: Weight,
        source_M: torch.Tensor | None = None,
        x_lora: torch.Tensor | None = None, scale: RankScale = UNSCALED,
    ) -> Rows:  # fmt: skip
        if source_M is None and (factors is None or weight.joined is None):
            rows = super().shrink(x, factors, weight, None, x_lora, scale)
            rows.x = aligned(rows.x)
            return rows
        x = self.dense(x)
        rows = self.buffers(x, x.shape[1], 0 if factors is None else _rank_of(factors), weight)
        factors = (None,) if factors is None else factors  # rows are copied all the same
        if x_lora is not None:
            rows.x.copy_(x)
            self.passes.shrink(
                self.dense(x_lora), factors, self.routing, self._padded(rows), source_M, scale=scale
            )
        else:
            self.passes.shrink(
                x, factors, self.routing, self._padded(rows), source_M, rows.x, scale
            )
        return rows

    def linear(self, rows: Rows, weight: Weight, b: Factors | None) -> torch.Tensor:
        if rows.joined is not None and weight.joined is not None and b is not None:
            return grouped_gemm_vendor(rows.joined, weight.joined.with_b(b), self.routing)
        return super().linear(rows, weight, b)

    def dgrad(self, rows: Rows, weight: Weight, a_ERK: torch.Tensor | None) -> torch.Tensor:
        if rows.joined is not None and weight.joined is not None and a_ERK is not None:
            return grouped_gemm_vendor(rows.joined, weight.joined.with_a(a_ERK), self.routing)
        return super().dgrad(rows, weight, a_ERK)

    def from_rank(self, s_MR: torch.Tensor, factor_ERN: torch.Tensor) -> torch.Tensor:
        return grouped_gemm_vendor(*self._rank_operands(s_MR, factor_ERN), self.routing)

    def product(self, rows: Rows, w_EKN: torch.Tensor, factors: Factors | None) -> torch.Tensor:
        y_MN = grouped_gemm_vendor(rows.x, w_EKN, self.routing)
        if factors is not None and rows.s_MR is not None:
            for factor_ErN, columns, ranks in columns_and_ranks(factors, y_MN.shape[1]):
                operands = self._rank_operands(rows.s_MR[:, ranks], factor_ErN)
                add_delta_vendor(y_MN[:, columns], *operands, self.routing)
        return y_MN

    def _rank_operands(
        self, s_MR: torch.Tensor, factor_ERN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With zeros up to rows of 16 bytes: they add nothing."""
        pad = padded_rank(s_MR.shape[1], s_MR.dtype) - s_MR.shape[1]
        if pad:
            s_MR = F.pad(s_MR, (0, pad))
            factor_ERN = F.pad(factor_ERN, (0, 0, 0, pad))
        return aligned(s_MR), aligned(factor_ERN)


def _rank_of(factors: Factors) -> int:
    """Columns of S that these factors make."""
    return sum(0 if a is None else a.shape[1] for a in factors)


def make_engine(backend: str, routing: Routing) -> Engine:
    """The engine of a back end other than ``reference``."""
    if backend == "loop":
        return Engine(routing, IN_TORCH, grouped_gemm_loop)
    if backend == "triton":
        return Engine(routing, IN_TRITON, grouped_gemm_triton)
    return VendorEngine(routing, IN_TRITON if routing.offsets_E.is_cuda else IN_TORCH)
