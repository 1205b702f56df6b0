"""Call readers of vocabulary-parallel logits chunk by chunk, and again in backward: the general
path of ``head.py``, for whatever ``token_logprobs.py`` does not compute.

Forward keeps no logits. Backward computes each chunk's again, calls the readers with autograd on
and lets it go through them. A reader must therefore return the same when it is called again.

Legend: N tokens of the call, H hidden, V entries of this rank's vocabulary, R rank of the adapter,
K trained rows of the output weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megalora.model.chunk_logits import logits_of, wide
from megalora.model.token_logprobs import TrainedRows, chunks
from megalora.model.vocab_logits import Reader, VocabLogits

Operands = Sequence[Tensor | None]
"""x and h, with a row for each token; B and trained rows, which belong to all tokens. None where
there is no such thing."""
BY_TOKEN = 2
"""The first so many operands have a row for each token."""


@dataclass(eq=False)
class _Call:
    """What stays the same over all chunks."""

    weight_VH: Tensor
    targets_N: Tensor | None
    group: ProcessGroup
    size: int
    readers: tuple[Reader, ...]
    columns_K: Tensor | None
    """As in ``TrainedRows``."""
    lengths: list[int] = field(default_factory=list)
    """Tensors that each reader returned as a tuple; 0 where it returned one tensor."""

    def read(self, part: slice, operands: Operands) -> list[Tensor]:
        """Results of all readers for one chunk, whose operands these are, in one flat list."""
        targets = None if self.targets_N is None else self.targets_N[part]
        x_CH, h_CR, b_VR, rows_KH = operands
        assert x_CH is not None
        logits = logits_of(x_CH, self.weight_VH, h_CR, b_VR, rows_KH, self.columns_K)
        chunk = VocabLogits(logits, targets, part, self.group)
        flat: list[Tensor] = []
        self.lengths = []
        for reader in self.readers:
            result = reader(chunk)
            if isinstance(result, tuple):
                self.lengths.append(len(result))
                flat.extend(result)
            else:
                self.lengths.append(0)
                flat.append(result)
        return flat


def _of_chunk(operands: Operands, part: slice) -> Operands:
    """The operands of one chunk's tokens."""
    by_token = [None if operand is None else operand[part] for operand in operands[:BY_TOKEN]]
    return (*by_token, *operands[BY_TOKEN:])


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *operands: Tensor | None) -> tuple[Tensor, ...]:
        by_chunk: list[list[Tensor]] = []
        assert operands[0] is not None
        for part in chunks(len(operands[0]), call.size):
            by_chunk.append(call.read(part, _of_chunk(operands, part)))
        results = tuple(torch.cat(rows) for rows in zip(*by_chunk, strict=True))
        ctx.call = call
        ctx.save_for_backward(*operands)
        ctx.mark_non_differentiable(*(r for r in results if not r.is_floating_point()))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        totals: list[Tensor | None] = []
        for place, operand in enumerate(operands):
            if operand is None:
                totals.append(None)
                continue
            # What belongs to all tokens has a sum over chunks, which bfloat16 would round at each.
            dtype = operand.dtype if place < BY_TOKEN else wide(operand.dtype)
            totals.append(torch.zeros_like(operand, dtype=dtype))
        for part in chunks(len(operands[0]), ctx.call.size):
            own: list[Tensor | None] = []
            for operand in _of_chunk(operands, part):
                own.append(None if operand is None else operand.detach().requires_grad_())
            leaves = [leaf for leaf in own if leaf is not None]
            with torch.enable_grad():
                results = ctx.call.read(part, own)
            wanted: list[Tensor] = []
            incoming: list[Tensor] = []
            for result, gradient in zip(results, grads, strict=True):
                # Ids have no gradient, and a result that the loss does not read gets none.
                if gradient is not None and result.requires_grad:
                    wanted.append(result)
                    # Every rank has the same result, and one t-th of the loss is each one's.
                    incoming.append(gradient[part] / ctx.call.group.size())
            if wanted:
                of_chunk = iter(torch.autograd.grad(wanted, leaves, incoming))
                for total in _of_chunk(totals, part):
                    # A view of x's and h's rows, written once; all of B and trained rows, added up.
                    if total is not None:
                        total += next(of_chunk)
        gradients: list[Tensor | None] = []
        for total, operand in zip(totals, operands, strict=True):
            gradients.append(None if total is None else total.to(operand.dtype))
        return None, *gradients


def read_chunks(
    x_NH: Tensor, weight_VH: Tensor, targets_N: Tensor | None, group: ProcessGroup, size: int,
    want: Mapping[str, Reader], *, h_NR: Tensor | None = None, b_VR: Tensor | None = None,
    trained: TrainedRows | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Name -> result of each reader for all tokens.

    Operands are those of ``token_logprobs``. Gradients reach x, h, B and trained rows alone: a
    tensor that a reader brings along gets none.
    """
    rows_KH = None if trained is None else trained.rows_KH
    columns_K = None if trained is None else trained.columns_K
    call = _Call(weight_VH, targets_N, group, size, tuple(want.values()), columns_K)
    flat: Any = iter(_Read.apply(call, x_NH, h_NR, b_VR, rows_KH))
    found: dict[str, Any] = {}
    for name, length in zip(want, call.lengths, strict=True):
        found[name] = tuple(next(flat) for _ in range(length)) if length else next(flat)
    return found
