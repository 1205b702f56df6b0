"""Keep experts evenly used: a loss on the router's scores, for each sequence and each layer.

    f_qe = E / (K n_q) * tokens of q that chose e          P_qe = mean over the tokens of q of s_te
    loss = coefficient / Q * sum over layers, q and e of f_qe P_qe

with s the scores of a token over all experts, which add up to 1: the softmax of its logits, or
their sigmoids over their sum. f has no gradient. It is the sequence-wise loss of DeepSeek-V3 (arXiv
2412.19437, equations 17 to 20), Megatron's ``seq_aux_loss``. One over a batch, such as that of
transformers, would depend on which sequences share a microbatch. Even routing gives each layer
``coefficient``, whatever the number of experts.

n_q, and Q, the sequences of the global batch, are counted from the data. The tokens of a sequence
may lie on several ranks of tensor and context parallelism: these add up how often each expert was
chosen, and each then computes the part of the sum that its own tokens have, so that no gradient
needs a reduction of its own.

Shape legend:
    T  tokens of this rank      Q  sequences of the row, filler last      E  experts
    K  experts per token
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.model.documents import RowSequences
from megalora.model.layer_rows import before_each_layer
from megalora.model.router import FrozenRouter
from megalora.parallel import Groups


class Balance:
    """The loss of one step at a time, over this rank's model chunks."""

    def __init__(self, chunks: Sequence[nn.Module], groups: Groups, coefficient: float) -> None:
        """Collective over the pipeline."""
        self.groups = groups
        self.coefficient = coefficient
        self._num_sequences = torch.ones((), device=host.device())
        self._row: RowSequences | None = None
        self._in_forward = False
        self._total = torch.zeros(1, dtype=torch.float64, device=host.device())
        before_each_layer(chunks, self._enter)
        num_layers = 0
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, FrozenRouter):
                    module.balance = self
                    num_layers += 1
        # A stage may have no experts, and reports a mean over all layers with the others.
        counted = torch.tensor(num_layers, device=host.device())
        dist.all_reduce(counted, group=groups.pp)
        self._num_layers = int(counted)

    def _enter(self, row: Any) -> None:
        """Know the sequences of the row that a layer computes."""
        self._row = getattr(row, "sequences", None)

    def begin(self, num_sequences: int) -> None:
        """Begin a step.

        Args:
            num_sequences: of this data-parallel rank's share of the global batch, at least 1.
        """
        # Filled on the device: nothing to copy, nothing to wait for.
        number = torch.full((), float(num_sequences), device=host.device())
        dist.all_reduce(number, group=self.groups.dp)
        self._num_sequences = number
        self._total.zero_()

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """Around the forward pass of a microbatch: what is computed once more in backward is not
        reported twice."""
        self._in_forward = True
        yield
        self._in_forward = False

    def total(self) -> Tensor:
        """float64 ``[1]`` on the device: mean over layers and sequences of sum_e f P, which is 1
        for even routing; collective over the world."""
        dist.all_reduce(self._total)
        return self._total / (self.coefficient * self._num_layers)

    def in_graph_of(
        self, weights_TE: Tensor, logits_TE: Tensor, map_TE: Tensor, router: FrozenRouter
    ) -> Tensor:
        """``weights_TE``, of which backward is that of the loss too.

        Args:
            weights_TE: weights of the chosen experts.
            logits_TE: logits, with what an adapter adds to them.
            map_TE: bool, the choice.
        """
        row = self._row
        assert row is not None, "the step sends the sequences of its rows"
        scores_TE = _scores(logits_TE, router.score_function)
        loss = (scores_TE * self._factors(row, map_TE, router.topk, scores_TE.dtype)).sum()
        if self._in_forward:
            self._total += loss.detach()
        # Without anything that learns below the router, there is nothing to add.
        if not loss.requires_grad:
            return weights_TE
        return _WithLoss.apply(weights_TE, loss)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def _factors(self, row: RowSequences, map_TE: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
        """``[T, E]``: what a token's score of an expert is multiplied by in the loss."""
        num_experts = map_TE.shape[1]
        chosen_QE = map_TE.new_zeros(len(row.lengths), num_experts, dtype=dtype)
        # Whole numbers: their sum does not depend on the order of additions.
        chosen_QE.index_add_(0, row.numbers, map_TE.to(dtype))
        for group in (self.groups.tp, self.groups.cp):
            if group.size() > 1:
                dist.all_reduce(chosen_QE, group=group)
        # 1 / n_q of f, and once more of the mean over tokens.
        lengths_Q = row.lengths.to(dtype)
        scale_Q = self.coefficient * num_experts / (top_k * lengths_Q.clamp(min=1).square())
        # Filler has the length 0, and no part in the loss.
        scale_Q = scale_Q * (lengths_Q > 0) / self._num_sequences
        return (chosen_QE * scale_Q[:, None])[row.numbers]


class _WithLoss(torch.autograd.Function):
    """The first argument; backward gives the second, a loss, the gradient 1. The objective's own
    terms have it too, since they are divided already and nothing is scaled."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], ctx.saved_tensors[0]


def _scores(logits_TE: Tensor, function: str) -> Tensor:
    """Scores over all experts that add up to 1, in float32 or float64."""
    # A family may route in bfloat16, in which a sum of 128 scores would be off by a percent.
    wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if function == "softmax":
        return wide_TE.softmax(-1)
    scores_TE = wide_TE.sigmoid()
    # All sigmoids may underflow: 1e-20, as in the choice.
    return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
