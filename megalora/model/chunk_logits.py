"""Make the logits of a chunk of tokens, read what a loss needs of them, and turn them into a
gradient: for ``token_logprobs.py``.

On a GPU two passes over the logits in their own dtype do it (``megalora_kernels.logit_rows``), of
which the second writes the gradient over them. Elsewhere torch widens them first and computes in
place.

Legend: C tokens of the chunk, H hidden, V entries of this rank's vocabulary, R rank of the adapter,
K trained rows of W, P blocks of a row of logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megalora_kernels import (
    join_blocks_triton,
    read_logits_triton,
    softmax_gradient_triton,
    takes_logit_kernels,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.comm import gather_seq
from megalora.model.vocab_logits import columns_of


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over the vocabulary: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def logits_of(
    x_CH: Tensor, weight_VH: Tensor, h_CR: Tensor | None = None, b_VR: Tensor | None = None,
    rows_KH: Tensor | None = None, columns_K: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[C, V] in float32 or wider. They are rounded to x's dtype first, as those of the layer
    itself are."""
    logits = rounded_logits(x_CH, weight_VH, h_CR, b_VR, rows_KH, columns_K)
    return logits.to(wide(x_CH.dtype))


def rounded_logits(
    x_CH: Tensor, weight_VH: Tensor, h_CR: Tensor | None = None, b_VR: Tensor | None = None,
    rows_KH: Tensor | None = None, columns_K: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[C, V] in x's dtype."""
    # Without columns the rows are the weight.
    if rows_KH is not None and columns_K is None:
        weight_VH = rows_KH
    logits = F.linear(x_CH, weight_VH)
    if rows_KH is not None and columns_K is not None:
        # Not a copy of the weight with other rows: it is the largest of the model.
        logits = logits.index_copy_(1, columns_K, F.linear(x_CH, rows_KH))
    if h_CR is not None and b_VR is not None:
        # In place, as the layer adds its adapter: backward of F.linear does not need the old value.
        logits = logits.addmm_(h_CR, b_VR.t())
    return logits


@dataclass(frozen=True, eq=False)
class _Chunk:
    """What one chunk's logits come to."""

    results: Tensor
    """[3, C]: logprob, lse, mean; zeros for a mean that nobody asked for."""
    exponentials: Tensor
    """[C, V], in the memory of the logits: probabilities but for a factor."""
    factor: Tensor
    """[C]."""

    def gradient(self, targets_C: Tensor, group: ProcessGroup, dtype: torch.dtype) -> Tensor:
        """d, [C, V], in the same memory again before it is rounded: to be called once."""
        d_CV = self.exponentials.mul_(self.factor[:, None])
        _add_to_targets(d_CV, targets_C, group, -1)
        return d_CV.to(dtype)


@dataclass(frozen=True, eq=False)
class _KernelChunk:
    """The same by kernels, with the logits still there."""

    results: Tensor
    """[3, C] as above; the mean is zeros where nobody asked for it."""
    logits: Tensor
    """[C, V] in x's dtype."""
    shift: Tensor
    """[C]: the largest logit of all ranks."""
    factor: Tensor
    """[C]: one over the sum of exponentials less ``shift``."""

    def gradient(self, targets_C: Tensor, group: ProcessGroup, dtype: torch.dtype) -> Tensor:
        """d, [C, V], over the logits: to be called once."""
        first = group.rank() * self.logits.shape[1]
        softmax_gradient_triton(self.logits, targets_C, first, self.shift, self.factor)
        return self.logits


def chunk_of(
    targets_C: Tensor, group: ProcessGroup, with_mean: bool, x_CH: Tensor,
    *operands: Tensor | None,
) -> _Chunk | _KernelChunk:  # fmt: skip
    """What the logits of x and ``operands``, those of ``logits_of`` behind it, come to."""
    logits = rounded_logits(x_CH, *operands)  # pyright: ignore[reportArgumentType]
    if takes_logit_kernels(x_CH):
        return _read_by_kernel(logits, targets_C, group, with_mean)
    # Named once: the rounded logits are freed before the widened ones are read.
    logits = logits.to(wide(x_CH.dtype))
    return _read(logits, targets_C, group, with_mean)


def _read_by_kernel(
    logits_CV: Tensor, targets_C: Tensor, group: ProcessGroup, with_mean: bool
) -> _KernelChunk:
    """Leaves the logits as they are."""
    width = logits_CV.shape[1]
    own_P4C = read_logits_triton(logits_CV, targets_C, group.rank() * width, with_mean)
    # One message, of four numbers for each block of a row. [t * P, 4, C]
    parts_P4C = gather_seq(own_P4C, group)
    rows_5C = join_blocks_triton(parts_P4C, width * group.size())
    return _KernelChunk(rows_5C[:3], logits_CV, rows_5C[3], rows_5C[4])


def _read(logits_CV: Tensor, targets_C: Tensor, group: ProcessGroup, with_mean: bool) -> _Chunk:
    """Consumes the logits."""
    width = logits_CV.shape[1]
    columns, here = columns_of(targets_C, group.rank() * width, width)
    target = logits_CV.gather(1, columns[:, None])[:, 0].masked_fill_(~here, 0.0)
    total = logits_CV.sum(1) if with_mean else torch.zeros_like(target)
    largest = logits_CV.amax(1)
    # In place: no second tensor as large as the logits.
    exponentials = logits_CV.sub_(largest[:, None]).exp_()
    own = torch.stack([largest, exponentials.sum(1), target, total])
    # One message instead of a maximum and three sums. [t * 4, C], for gloo wants dim 0 to grow.
    parts = gather_seq(own, group).view(group.size(), *own.shape)
    largest_of_all = parts[:, 0].amax(0)
    sum_of_all = (parts[:, 1] * (parts[:, 0] - largest_of_all).exp()).sum(0)
    log_sum = sum_of_all.log()
    # l_y - max first: lse itself is rounded at the size of the logits, which may be large.
    logprob = parts[:, 2].sum(0) - largest_of_all - log_sum
    mean = parts[:, 3].sum(0) / (width * group.size())
    results = torch.stack([logprob, largest_of_all + log_sum, mean])
    factor = (largest - largest_of_all).exp() / sum_of_all
    return _Chunk(results, exponentials, factor)


def weighted_gradient(
    targets_C: Tensor, group: ProcessGroup, lse_C: Tensor,
    grads: tuple[Tensor, Tensor, Tensor | None], x_CH: Tensor, *operands: Tensor | None,
) -> Tensor:  # fmt: skip
    """Gradient of a chunk's logits, [C, V] in x's dtype, from those of the three results, [C].
    ``lse`` of all ranks is known from forward: there is nothing to send."""
    g_logprob, g_lse, g_mean = grads
    d_CV = rounded_logits(x_CH, *operands)  # pyright: ignore[reportArgumentType]
    width = d_CV.shape[1]
    add_C = None if g_mean is None else g_mean / (width * group.size())
    if takes_logit_kernels(x_CH):
        softmax_gradient_triton(
            d_CV, targets_C, group.rank() * width, lse_C, g_lse - g_logprob, g_logprob, add_C
        )
        return d_CV
    d_CV = d_CV.to(wide(x_CH.dtype)).sub_(lse_C[:, None]).exp_().mul_((g_lse - g_logprob)[:, None])
    _add_to_targets(d_CV, targets_C, group, g_logprob)
    if add_C is not None:
        d_CV += add_C[:, None]
    return d_CV.to(x_CH.dtype)


def _add_to_targets(values_CV: Tensor, targets_C: Tensor, group: ProcessGroup, add: Any) -> None:
    """Add ``add``, ``[C]`` or one number, to the column of each token that lies on this rank, in
    place."""
    width = values_CV.shape[1]
    columns, here = columns_of(targets_C, group.rank() * width, width)
    values_CV.scatter_add_(1, columns[:, None], (here * add).to(values_CV.dtype)[:, None])
