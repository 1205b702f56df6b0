"""The model's end: from the last hidden states to log-probabilities of given tokens, without ever
holding the logits of more than one chunk of tokens.

``project`` goes into ``GPTModel.forward(output_processor=...)``. Megatron calls it on the last
pipeline stage in place of its output layer and loss, and returns what it returns.

A chunk has as many tokens as fit into ``chunk_bytes`` (``head_chunk.py``). On the fast path a logit
takes e bytes on a GPU, those of the model's dtype, and elsewhere 4 + e: float32, and rounded before
and after. With readers it takes 16 + e: their own temporaries are counted as three more tensors in
float32.

Beside it the call keeps x of its N tokens (N * H * e, where tokens were gathered or selected) and,
for a frozen layer, as much again for the gradient that forward makes. Qwen3's 151,936 entries in
bfloat16: chunks of 512 tokens, and 0.6 GiB instead of 28 GiB for 32k tokens on one rank, counted by
``benchmarks/lean_loss.py``.

Legend: S sequence, B microbatch, N tokens of the call, C tokens of a chunk, H hidden, V vocabulary,
R rank of the adapter, /t divided over the tensor-parallel group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megalora_kernels import takes_logit_kernels
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.comm import gather_seq
from megalora.model.chunk_logits import wide
from megalora.model.chunked_readers import read_chunks
from megalora.model.head_chunk import CHUNK_BYTES, bytes_per_logit, chunk_tokens
from megalora.model.score_head import ScoreHead
from megalora.model.token_logprobs import TrainedRows, token_logprobs
from megalora.model.vocab_logits import Reader, logprob, logsumexp, mean_logit

FUSED = (logprob, logsumexp, mean_logit)
"""Readers that the fast path has, in the order of its results."""
Outputs = dict[str, Any]
"""Name of a reader -> its result for all tokens: a tensor ``[N, ...]``, or a tuple of them."""


@dataclass(frozen=True, eq=False)
class Head:
    """The output layer on this rank, with or without an adapter or trained rows.

    tensor   shape on one rank   across TP           gradient across TP
    weight   [V/t, H]            dim 0, in order     none, but for trained rows
    b        [V/t, R]            dim 0               whole
    x        [N, H]              replicated          partial: each rank saw V/t entries
    h        [N, R]              replicated          partial
    result   [N, ...]            replicated          whole on each rank

    The vocabulary is never padded: the config refuses a tp that does not divide it.
    """

    weight: Tensor
    group: ProcessGroup
    b: Tensor | None = None
    """B of the adapter, scale folded in."""
    trained: TrainedRows | None = None
    """Rows of the weight that are trained."""
    chunk_bytes: int = CHUNK_BYTES

    def chunk_size(self, bytes_per_logit: int) -> int:
        """Tokens of a chunk."""
        return chunk_tokens(self.chunk_bytes, len(self.weight), bytes_per_logit)

    def __call__(
        self,
        x_NH: Tensor,
        targets_N: Tensor | None,
        want: Mapping[str, Reader],
        h_NR: Tensor | None = None,
    ) -> Outputs:
        """What each of ``want`` reads from the logits of all N tokens, on every rank of the group.

        ``logprob``, ``logsumexp`` and ``mean_logit`` alone take the fast path. Any other reader
        beside them is called chunk by chunk, and once more in backward; the gradient reaches x, h
        and B through it, and no other tensor that it may hold.

        Args:
            targets_N: int64, for readers that look at the tokens that came.
            h_NR: A x of the adapter; given exactly if the head has a B.
        """
        assert (h_NR is None) == (self.b is None), "h and B of an adapter belong together"
        if all(reader in FUSED for reader in want.values()):
            assert targets_N is not None, "log-probabilities of which tokens?"
            width = bytes_per_logit(x_NH.element_size(), takes_logit_kernels(x_NH))
            results = token_logprobs(
                x_NH, self.weight, targets_N, self.group, self.chunk_size(width),
                with_mean=mean_logit in want.values(), h_NR=h_NR, b_VR=self.b,
                trained=self.trained,
            )  # fmt: skip
            return {name: results[FUSED.index(reader)] for name, reader in want.items()}
        # Three more tensors in float32 than the fast path has without kernels.
        size = self.chunk_size(4 * wide(x_NH.dtype).itemsize + x_NH.element_size())
        return read_chunks(
            x_NH, self.weight, targets_N, self.group, size, want, h_NR=h_NR, b_VR=self.b,
            trained=self.trained,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a caller of the model wants of its head: the ``context`` of ``project``."""

    targets: Tensor | None
    """[N] int64: the tokens that came, on the device; None where no reader looks at them."""
    positions: Tensor | None = None
    """[N] int64 places of these tokens among all B * S of the microbatch, sample by sample, each at
    most once; None for all. The host knows N, so nothing waits for the device."""
    want: Mapping[str, Reader] = field(default_factory=lambda: {"logprob": logprob})
    chunk_bytes: int = CHUNK_BYTES


def project(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Wanted,
    config: Any, **_: Any,
) -> Outputs:  # fmt: skip
    """What ``context`` wants of hidden states ``[S/t, B, H]``.

    Args:
        output_layer: Megatron's, or the ``ColumnLoRA`` around it; or a ``ScoreHead``, which gives
            the ``scores`` of these positions.
        output_weight: of tied embeddings; None where the layer has its own.
    """
    if isinstance(output_layer, ScoreHead):
        return {"scores": _select(output_layer(hidden_states), context.positions)}
    base, adapter = _layers(output_layer)
    x_NH, weight = _operands(hidden_states, base, output_weight, context, config)
    h_NR = None
    b_VR = None
    if adapter is not None:
        # A x of the rank's own tokens, dropout included, as the layer itself computes it.
        h_NR = _select(adapter.low_rank(hidden_states), context.positions)
        b_VR = adapter.factors.stacked_b()
    head = Head(
        weight.detach(), base.tp_group, b_VR, _trained(output_layer, weight), context.chunk_bytes
    )
    return head(x_NH, context.targets, context.want, h_NR)


def last_hidden(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Wanted,
    config: Any, **_: Any,
) -> Outputs:  # fmt: skip
    """In place of ``project``: what the base's head would multiply, for whoever needs its logits
    later. ``hidden [N, H]`` is at ``context.positions``, alike on every rank; ``weight [V/t, H]``
    is this rank's part of the output weight, without an adapter."""
    base, _ = _layers(output_layer)
    x_NH, weight = _operands(hidden_states, base, output_weight, context, config)
    return {"hidden": x_NH, "weight": weight.detach()}


def _layers(output_layer: Any) -> tuple[Any, Any]:
    """(Megatron's output layer, the ``ColumnLoRA`` around it or None)."""
    if hasattr(output_layer, "factors"):
        return output_layer.base, output_layer
    # One with trained rows is around it, too.
    return getattr(output_layer, "base", output_layer), None


def _operands(
    hidden_states: Tensor, base: Any, output_weight: Tensor | None, context: Wanted, config: Any
) -> tuple[Tensor, Tensor]:
    """(x [N, H] of all tokens in question, output weight [V/t, H])."""
    assert not getattr(config, "use_mup", False), "the head does not scale logits"
    group = base.tp_group
    assert config.sequence_parallel == (group.size() > 1), "hidden states are split over TP"
    weight = base.weight if output_weight is None else output_weight
    # Backward of the gather sums the ranks' parts of dx and hands each its own tokens.
    return _select(gather_seq(hidden_states, group), context.positions), weight


def _trained(output_layer: Any, weight: Tensor) -> TrainedRows | None:
    """Rows of the output weight that are trained; None where it is frozen."""
    # The module of ``lora/unfrozen.py`` around the layer.
    if hasattr(output_layer, "of_rank"):
        return output_layer.of_rank()
    return TrainedRows(weight, None) if weight.requires_grad else None


def _select(x_T1F: Tensor, positions_N: Tensor | None) -> Tensor:
    """[T, 1, F] -> [N, F]: the tokens at ``positions``. A microbatch is one row, so Megatron's
    dimension of samples is 1."""
    x_TF = x_T1F.squeeze(1)
    if positions_N is None:
        return x_TF
    return torch.index_select(x_TF, 0, positions_N)
