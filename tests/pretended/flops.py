"""Count FLOPs of matrix products on the pretended GPU, under the name of the layer they belong to.

A multiplication and an addition are 2 FLOPs. Operations of torch are counted by torch's own
registry, Triton kernels by the sizes they are launched with. Three operations would take other
kernels on a device that torch does not know; ``AsOnCuda`` calls those that CUDA gets.
"""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class FusedRMSNorm(torch.autograd.Function):
    """CUDA's ``_fused_rms_norm``, which torch composes of float32 operations on other devices: it
    keeps its input, the weight and one float32 a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # 1 / rms of each row, from which backward needs no second pass over the row.
        rms = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, rms)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


class AsOnCuda(TorchFunctionMode):
    """Call what torch chooses for a CUDA device: the fused RMS norm, flash attention and fused
    dropout, which keeps a mask of booleans."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            return FusedRMSNorm.apply(args[0], kwargs["weight"])
        if func is F.scaled_dot_product_attention:
            assert kwargs["is_causal"], "flash attention takes no mask"
            return aten._scaled_dot_product_flash_attention(
                *args, 0.0, True, scale=kwargs["scale"]
            )[0]
        # torch's own condition for the fused kernel.
        if func is F.dropout and kwargs["training"] and 0 < kwargs["p"] < 1:
            return aten.native_dropout(args[0], kwargs["p"], True)[0]
        return func(*args, **kwargs)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor) -> int:
    """[M, K] by [E, K, N], each row with its expert's matrix; or [R, M] by [M, K]."""
    rows, inner = a.shape
    return 2 * rows * inner * b.shape[-1]


def _gemm(a: dict[str, Any]) -> int:
    """``x w + s b``: every block of b meets its own columns of s alone."""
    rows, columns = a["y_ptr"].shape
    # RANKS has (first rank, number of ranks) of each block of b.
    ranks = sum(rank for _, rank in a["RANKS"])
    return 2 * rows * (columns * a["K"] + a["block_columns"] * ranks)


def _shrink(a: dict[str, Any]) -> int:
    rank = a["R"] + a["R2"]
    return 2 * a["s_ptr"].shape[0] * a["K"] * rank if rank else 0


def _swiglu(a: dict[str, Any]) -> int:
    return 2 * a["h_ptr"].shape[0] * a["I"] * a["Q"]


def _swiglu_backward(a: dict[str, Any]) -> int:
    """Gradients of A of down, and of B of gate and of up from their own columns of S."""
    # S of gate and up stand side by side; where only one has an adapter, only its columns count.
    columns_of_s = a["R_GATE"] + a["R"] - a["UP_FROM"] if a["R"] else 0
    return 2 * a["dh_ptr"].shape[0] * a["I"] * (a["Q"] + columns_of_s)


def _wgrad(a: dict[str, Any]) -> int:
    return 2 * a["g_ptr"].shape[0] * a["R"] * a["K"]


KERNEL_FLOPS: dict[str, Any] = {
    "_gemm_kernel": _gemm,
    "_shrink_kernel": _shrink,
    "_swiglu_kernel": _swiglu,
    "_swiglu_backward_kernel": _swiglu_backward,
    "_wgrad_kernel": _wgrad,
    # These move or add numbers: no matrix product, so no FLOPs of the planner's kind.
    **dict.fromkeys(
        ("_combine_kernel", "_regroup_kernel", "_count_kernel", "_place_kernel", "_places_kernel",
         "_spread_kernel", "_sum_parts_kernel", "_gain_rows_kernel", "_gain_gradient_kernel",
         "_read_logits_kernel", "_join_blocks_kernel", "_softmax_gradient_kernel"),
        lambda a: 0,
    ),
}  # fmt: skip
"""FLOPs of a launch from its arguments by name. A kernel that is not here raises ``KeyError``."""


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_k: int, products: int) -> int:
    """Variable-length flash attention, [T, heads, d], as torch's registry counts any: whole squares
    of queries and keys, causal or not. Documents are of one length here."""
    num_tokens, heads, head_dim = q.shape
    assert num_tokens % max_k == 0, "documents of several lengths"
    return products * 2 * num_tokens * max_k * heads * head_dim


def _varlen_forward(*args: Any) -> int:
    # q k, and the weights with v
    q, k, v, _, _, _, max_k, *_ = args
    return _varlen(q, k, v, max_k, 2)


def _varlen_backward(*args: Any) -> int:
    # q k anew, the gradients of the weights, and of q, k and v
    _, q, k, v, _, _, _, _, _, max_k, *_ = args
    return _varlen(q, k, v, max_k, 5)


VARLEN = {"_varlen_attn": _varlen_forward, "_varlen_attn_backward": _varlen_backward}
"""Attention by document, whose operations torch's registry does not have."""
IN_PLACE: dict[Any, Any] = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
"""What torch's registry has only under the other name."""


class Work(TorchDispatchMode):
    """Adds up FLOPs under the name of where the model is."""

    def __init__(self) -> None:
        super().__init__()
        self.place = "embedding"
        self.is_backward = False
        self.flops: Counter[tuple[str, bool]] = Counter()

    def add(self, flops: int) -> None:
        self.flops[self.place, self.is_backward] += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # Overloads of one operation (out=, scalars) do the same work.
        packet = IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if packet is aten._grouped_mm:
            self.add(_grouped_mm(args[0], args[1]))
        elif func.namespace == "torch_attn":
            self.add(VARLEN[packet.__name__](*args))
        elif packet in flop_registry:
            self.add(flop_registry[packet](*args, **kwargs, out_val=out))
        return out

    def launched(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Launchers give pointers and sizes by position, compile-time constants by name.
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        self.add(KERNEL_FLOPS[kernel.fn.__name__](named))
