"""Compute core attention inside the documents of a row.

Shape legend:
    T  tokens of the row     c  context-parallel size     h  query heads on this rank
    g  key/value heads on this rank     d  head dim

    q [T/c, h, d]     k, v [T/c, g, d]  ->  gathered over c, [T, g, d]  ->  one ``attend`` a chunk

With few key/value heads, gathering them moves less than sending queries around: 2 g d T (c-1)/c
elements each way against (2 h + 2 max(g, c)) d T/c (c-1)/c of an exchange of heads for sequences,
with 32 query and 4 key/value heads up to c = 8. All keys and values of a row are kept for backward,
unless core attention is recomputed, which gathers them anew.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right

from megalora.comm import gather_seq
from megalora.model.documents import Chunk, Documents, unzigzag

FLASH_IMPLEMENTATIONS = {"flash3": "FA3", "flash4": "FA4"}
"""Value of ``model.attention`` -> torch's name for the implementation."""
MAX_FLASH_HEAD_DIM = 256
"""Largest head that torch's variable-length flash attention takes."""
CUDNN_FROM = 2048
CUDNN_MULTIPLE = 1024
MAX_FILLER = 128
"""``auto`` attends to a row's documents one by one, by cuDNN's kernels on Hopper, if all have one
length, ``CUDNN_FROM`` tokens or more and a multiple of ``CUDNN_MULTIPLE`` with the token that is
only predicted: as samples have that are cut. A last one below ``MAX_FILLER`` may be filler.

Forward and backward of two documents of 4,096 tokens of Qwen3-30B-A3B take 2.17 ms a layer on an
H100, where torch's variable-length flash attention takes 3.48 (kernel times of
benchmarks/results/gpu_attention.json). cuDNN plans anew for each length, about 0.1 s, which would
be lost on samples of ever new lengths.
"""


def attend_reference(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, scale: float) -> Tensor:
    """One scaled dot-product attention for each piece, on any device and in any dtype.

    Args:
        q: [queries of the chunk, h, d].
        k, v: [keys of the chunk, g, d].

    Returns: [queries, h, d].
    """
    queries = [end - start for start, end in pairwise(chunk.query_ends)]
    keys = [end - start for start, end in pairwise(chunk.key_ends)]
    # Pieces of one size are a batch: one call, and the result is written once.
    if len(set(queries)) == len(set(keys)) == 1:
        return _attend_batch(q, k, v, len(queries), scale)
    pieces = []
    by_piece = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    for q_piece, k_piece, v_piece in by_piece:
        pieces.append(_attend_batch(q_piece, k_piece, v_piece, 1, scale))
    return torch.cat(pieces)


def _attend_batch(q: Tensor, k: Tensor, v: Tensor, num_pieces: int, scale: float) -> Tensor:
    """Causal attention in each of several pieces of one size, [pieces x tokens, heads, d]."""
    # [pieces, heads, tokens, d], the order that torch attends in
    q, k, v = (x.unflatten(0, (num_pieces, -1)).transpose(1, 2) for x in (q, k, v))
    num_queries = q.shape[2]
    num_keys = k.shape[2]
    # A piece that begins inside its document has keys before its first query.
    mask: Any = None
    if num_queries != num_keys:
        mask = causal_lower_right(num_queries, num_keys)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(0, 1)


def attend_flash(
    q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, bounds: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """The same by torch's variable-length flash attention: CUDA, 16 bits, heads up to 256."""
    from torch.nn.attention.varlen import varlen_attn

    options = _varlen_options(varlen_attn)
    if "enable_gqa" in options:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, *bounds, chunk.longest_query, chunk.longest_key, scale=scale, **options
    )
    # Nothing but the result was asked for.
    assert isinstance(out, Tensor)
    return out


def suits_cudnn(chunk: Chunk) -> bool:
    """Whether a chunk has whole documents alone, which are as ``CUDNN_FROM`` wants them."""
    # Of a document that began in an earlier chunk there are more keys than queries.
    if chunk.query_ends != chunk.key_ends:
        return False
    lengths = [end - start for start, end in pairwise(chunk.query_ends)]
    if len(lengths) > 1 and lengths[-1] < MAX_FILLER:
        del lengths[-1]
    # A row has the inputs of a sample, one less than its tokens.
    cut = (lengths[0] + 1) % CUDNN_MULTIPLE == 0
    return len(set(lengths)) == 1 and lengths[0] + 1 >= CUDNN_FROM and cut


@cache
def _varlen_options(varlen_attn: Callable[..., Any]) -> dict[str, Any]:
    """How this release of torch is told to be causal, and whether it wants to hear of grouped
    heads."""
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        # No key behind a query: causal, with the last query at the last key.
        options["window_size"] = (-1, 0)
    elif "is_causal" in known:
        options["is_causal"] = True
    else:
        raise RuntimeError(
            f"torch {torch.__version__}: varlen_attn takes neither window_size nor is_causal, so it"
            " cannot be told to be causal; set model.attention=sdpa"
        )
    if "enable_gqa" in known:
        options["enable_gqa"] = False
    return options


def activate(name: str) -> None:
    """Prepare the implementation that ``model.attention`` names; raises ``ValueError`` where this
    torch does not have it."""
    if name not in FLASH_IMPLEMENTATIONS:
        return
    wanted = FLASH_IMPLEMENTATIONS[name]
    select: Any = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if select is None:
        raise ValueError(
            f"model.attention={name} needs torch.nn.attention.activate_flash_attention_impl, which"
            f" torch {torch.__version__} does not have; set model.attention=auto"
        )
    try:
        select(wanted)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"model.attention={name}: torch cannot use {wanted} here ({error}); set"
            " model.attention=auto"
        ) from error


class DocumentAttention(nn.Module):
    """Causal attention over the heads of this rank; what Megatron calls ``core_attention``."""

    def __init__(
        self,
        config: Any,
        *args: Any,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        implementation: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        # yarn's attention factor is in the given scale (``rotary.softmax_scale``).
        self.scale = softmax_scale
        if softmax_scale is None:
            self.scale = 1 / math.sqrt(config.kv_channels)
        self.cp: ProcessGroup | None = getattr(pg_collection, "cp", None)
        self.implementation = implementation

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: Documents | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend within documents, or without ``packed_seq_params`` within each of B sequences.

        Args:
            query: ``[T/c, 1, h, d]``, or ``[S, B, h, d]`` without documents.
            key, value: the same with g heads.

        Returns: ``[T/c, 1, h * d]``, or ``[S, B, h * d]``.
        """
        scale = self.scale
        assert scale is not None
        if packed_seq_params is None:
            return self._whole_sequences(query, key, value, scale)
        documents = packed_seq_params
        k_TgD = self._gathered(key[:, 0])
        v_TgD = self._gathered(value[:, 0])
        flash = self._takes_flash(query)
        outputs = []
        sizes = [chunk.stop - chunk.start for chunk in documents.chunks]
        parts = zip(documents.chunks, documents.bounds, query[:, 0].split(sizes), strict=True)
        for chunk, bounds, q in parts:
            k = k_TgD[chunk.first_key : chunk.stop]
            v = v_TgD[chunk.first_key : chunk.stop]
            if flash and not (self.implementation == "auto" and suits_cudnn(chunk)):
                outputs.append(attend_flash(q, k, v, chunk, bounds, scale))
            else:
                outputs.append(attend_reference(q, k, v, chunk, scale))
        # ``cat`` of one tensor would copy it.
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out.flatten(1)[:, None]

    def _gathered(self, local: Tensor) -> Tensor:
        """Keys or values of the whole row, in its order."""
        if self.cp is None or self.cp.size() == 1:
            return local
        return unzigzag(gather_seq(local, self.cp), self.cp.size())

    def _takes_flash(self, query: Tensor) -> bool:
        """Whether the flash kernels can compute this; they want CUDA, 16 bits and small heads."""
        if self.implementation == "sdpa":
            return False
        fits = query.element_size() == 2 and query.shape[-1] <= MAX_FLASH_HEAD_DIM
        return fits and query.device.type != "cpu"

    def _whole_sequences(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Each of B sequences by itself, as comparisons with other implementations have them."""
        assert self.cp is None or self.cp.size() == 1, (
            "context parallelism needs to know the documents of a row"
        )
        # [S, B, heads, d] -> [B, heads, S, d], the order that torch attends in
        q = query.permute(1, 2, 0, 3)
        k = key.permute(1, 2, 0, 3)
        v = value.permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        # [B, h, S, d] -> [S, B, h * d], as o_proj takes it
        return out.permute(2, 0, 1, 3).flatten(2)
