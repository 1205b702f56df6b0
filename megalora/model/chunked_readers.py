"""Call readers of vocabulary-parallel logits chunk by chunk, and again in backward: the general
path of ``head.py``, for whatever ``token_logprobs.py`` does not compute.

Forward keeps no logits. Backward computes each chunk's again, calls the readers with autograd on
and lets it go through them. A reader must therefore return the same when it is called again.

Legend: N tokens of the call, H hidden, V entries of this rank's vocabulary, R rank of the adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megalora.model.token_logprobs import chunks, logits_of, wide
from megalora.model.vocab_logits import Reader, VocabLogits

Operands = Sequence[Tensor]
"""x, and for a layer with an adapter h and B behind it."""


@dataclass(eq=False)
class _Call:
    """What stays the same over all chunks."""

    weight_VH: Tensor
    targets_N: Tensor | None
    group: ProcessGroup
    size: int
    readers: tuple[Reader, ...]
    lengths: list[int] = field(default_factory=list)
    """Tensors that each reader returned as a tuple; 0 where it returned one tensor."""

    def read(self, part: slice, operands: Operands) -> list[Tensor]:
        """Results of all readers for one chunk, whose operands these are, in one flat list."""
        targets = None if self.targets_N is None else self.targets_N[part]
        x_CH, *adapter = operands
        logits = logits_of(x_CH, self.weight_VH, *adapter)
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
    """x and h have a row for each token; B belongs to all."""
    return (*(operand[part] for operand in operands[:2]), *operands[2:])


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *operands: Tensor) -> tuple[Tensor, ...]:
        by_chunk: list[list[Tensor]] = []
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
        totals = [torch.zeros_like(operand) for operand in operands]
        # B's gradient is a sum over chunks, which bfloat16 would round at each.
        if len(operands) == 3:
            totals[2] = totals[2].to(wide(totals[2].dtype))
        for part in chunks(len(operands[0]), ctx.call.size):
            leaves = [leaf.detach().requires_grad_() for leaf in _of_chunk(operands, part)]
            with torch.enable_grad():
                results = ctx.call.read(part, tuple(leaves))
            wanted: list[Tensor] = []
            incoming: list[Tensor] = []
            for result, gradient in zip(results, grads, strict=True):
                # Ids have no gradient, and a result that the loss does not read gets none.
                if gradient is not None and result.requires_grad:
                    wanted.append(result)
                    # Every rank has the same result, and one t-th of the loss is each one's.
                    incoming.append(gradient[part] / ctx.call.group.size())
            if wanted:
                of_chunk = torch.autograd.grad(wanted, leaves, incoming)
                for total, gradient in zip(_of_chunk(totals, part), of_chunk, strict=True):
                    # A view of x's and h's rows, written once; the whole of B's, added up.
                    total += gradient
        return None, *(t.to(o.dtype) for t, o in zip(totals, operands, strict=True))


def read_chunks(
    x_NH: Tensor, weight_VH: Tensor, targets_N: Tensor | None, group: ProcessGroup, size: int,
    want: Mapping[str, Reader], *, h_NR: Tensor | None = None, b_VR: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Name -> result of each reader for all tokens.

    Operands are those of ``token_logprobs``. Gradients reach x, h and B alone: a tensor that a
    reader brings along gets none.
    """
    call = _Call(weight_VH, targets_N, group, size, tuple(want.values()))
    operands = (x_NH,) if h_NR is None else (x_NH, h_NR, b_VR)
    flat: Any = iter(_Read.apply(call, *operands))  # pyright: ignore[reportArgumentType]
    found: dict[str, Any] = {}
    for name, length in zip(want, call.lengths, strict=True):
        found[name] = tuple(next(flat) for _ in range(length)) if length else next(flat)
    return found
