"""LoRA for Megatron's column- and row-parallel linears: attention, dense MLP, lm_head; with
magnitudes DoRA (``magnitude.py``).

Shape legend:
    S  sequence      B  batch      R  sum of the ranks stacked in A
    /t  divided over the tensor-parallel group
"""

from typing import Any

from megalora_kernels import add_low_rank
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalora.comm import gather_seq, scatter_seq
from megalora.lora.factors import LoRAFactors
from megalora.lora.magnitude import scale_rows
from megalora.model.coded_linear import base_weight_of


class _DenseLoRA(nn.Module):
    """``base(x) + B A dropout(x)``; a subclass says how ``A x`` travels over tensor parallelism."""

    def __init__(self, base: Any, factors: LoRAFactors, tp: ProcessGroup, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.factors = factors
        self.tp = tp
        self.dropout = dropout
        # A function, because the parameter may still be moved or replaced.
        # Of ``base``, not of ``self``, which would keep itself alive through its factors.
        factors.base_weight = lambda: base_weight_of(base)
        self.adds_bias = False
        """Whether to add the bias here, behind the magnitudes, where the base would have."""
        if len(factors.lora_M) and not base.skip_bias_add:
            base.skip_bias_add = True
            self.adds_bias = True

    def across_tp(self, h: Tensor) -> Tensor:
        """``A x`` of this rank's part of x, as the rows of ``out`` need it."""
        raise NotImplementedError

    def low_rank(self, x: Tensor) -> Tensor:
        """``A dropout(x)`` as the rows of ``out`` need it."""
        return self.across_tp(self.factors.times_a(x, self.dropout if self.training else 0.0))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        # Megatron's linears return their bias instead of adding it, for their caller to fuse.
        out, bias = self.base(x, *args, **kwargs)
        out = add_low_rank(out, self.low_rank(x), self.factors.stacked_b())
        if len(self.factors.lora_C):
            out = out + self.factors.stacked_bias()
        # A magnitude scales what the weight makes, and not the bias.
        if len(self.factors.lora_M):
            out = scale_rows(out, self.factors)
        if self.adds_bias and bias is not None:
            return out + bias, None
        return out, bias


class ColumnLoRA(_DenseLoRA):
    """A column-parallel linear with adapters on its projections.

    tensor   shape on one rank   across TP     gradient across TP
    A        [R, in]             replicated    partial: each rank saw S/t tokens
    B        [out/t, R]          dim 0         whole
    x        [S/t, B, in]        dim 0
    h        [S/t, B, R]         dim 0, gathered to [S, B, R]: the only thing that moves
    result   [S, B, out/t]       dim 2
    """

    @property
    def weight(self) -> Any:
        # Megatron reads output_layer.weight when embeddings are tied.
        return self.base.weight

    def across_tp(self, h: Tensor) -> Tensor:
        """[S/t, B, R] -> [S, B, R]"""
        return gather_seq(h, self.tp)


class RowLoRA(_DenseLoRA):
    """A row-parallel linear with an adapter.

    tensor   shape on one rank   across TP     gradient across TP
    A        [R, in/t]           dim 1         whole
    B        [out, R]            replicated    partial: each rank saw S/t tokens
    x        [S, B, in/t]        dim 2
    h        [S, B, R]           a partial sum, reduce-scattered to [S/t, B, R]; all that moves
    result   [S/t, B, out]       dim 0
    """

    def across_tp(self, h: Tensor) -> Tensor:
        """[S, B, R], a partial sum -> [S/t, B, R], whole"""
        return scatter_seq(h, self.tp)
