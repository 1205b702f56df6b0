"""One pass over a global batch: microbatches through Megatron's pipeline schedule, then one reduction of gradients."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megalora import host
from megalora.data.loader import Batch
from megalora.lora.factors import sum_partial_gradients
from megalora.lora.inject import GradientCheck
from megalora.parallel import Groups
from megalora.train.loss import loss_sum, token_losses


class Stepper:
    """Runs global batches through this rank's model chunks; ``train`` leaves reduced gradients behind."""

    def __init__(self, chunks: Sequence[Any], groups: Groups, check: GradientCheck | None = None) -> None:
        self.chunks, self.groups, self.check = list(chunks), groups, check
        self.parameters = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        self.b_has_moved = False
        config = chunks[0].config
        config.finalize_model_grads_func = self._finalize
        config.no_sync_func = None

    def train(self, batches: list[Batch], optimizer: Any) -> tuple[float, int]:
        """Forward and backward; returns (mean loss, number of target tokens) of the global batch."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        self.chunks[0].config.grad_scale_func = optimizer.scale_loss
        return self._mean(self._run(batches, forward_only=False))

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], *, own: bool = False) -> tuple[float, int]:
        """Forward only; the same mean, or with ``own`` that of this data-parallel rank's batches alone."""
        for chunk in self.chunks:
            chunk.eval()
        return self._mean(self._run(batches, forward_only=True), own)

    @torch.no_grad()
    def token_losses(self, batches: list[Batch]) -> Tensor:
        """Cross entropy of every token of the first of ``batches``, ``[B, S]`` float32, on every rank.

        All ranks pass the same batches: more than one only because the schedule wants them.
        """
        for chunk in self.chunks:
            chunk.eval()
        reports = self._schedule(batches, forward_only=True, loss=token_losses)
        losses = torch.zeros(batches[0].tokens.shape, device=host.device())
        if reports:  # only the last stage has any
            losses += reports[0]["token_losses"]
        dist.all_reduce(losses, group=self.groups.pp)
        return losses

    def _mean(self, sum_and_count: Tensor, own: bool = False) -> tuple[float, int]:
        for group in (self.groups.pp,) if own else (self.groups.pp, self.groups.dp):
            dist.all_reduce(sum_and_count, group=group)
        loss, count = sum_and_count.tolist()
        return loss / max(count, 1), int(count)

    def _run(self, batches: list[Batch], forward_only: bool) -> Tensor:
        """(sum of losses, number of target tokens) on the last pipeline stage, zeros elsewhere."""
        total = torch.zeros(2, dtype=torch.float64, device=host.device())
        for report in self._schedule(batches, forward_only, loss_sum):
            total += report["sum_and_count"]
        return total

    def _schedule(self, batches: list[Batch], forward_only: bool, loss: Callable[..., Any]) -> list[dict[str, Tensor]]:
        """What ``loss`` reports of each microbatch, on the last pipeline stage."""
        iterators = [iter(batches) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, loss=loss),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
        )

    def _finalize(self, model: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Check, Megatron's data-parallel reduction, then the sums of replicated factors over the group the table names.

        In this order replicas get the same bits: data-parallel reductions of two tensor-parallel ranks are different
        collectives, which may add in different orders. What they leave outside a rank's own slice is summed too and read by
        nobody.
        """
        if self.check is not None:
            self.check.after_backward(self.b_has_moved)
        finalize_model_grads(model, num_tokens, **kwargs)
        for name in ("tp", "etp"):
            sum_partial_gradients((p for p in self.parameters if p.sum_group == name), self.groups.named(name))


def _forward_step(batches: Iterator[Batch], model: nn.Module, loss: Callable[..., Any]) -> tuple[Tensor, Any]:
    batch, device = next(batches), host.device()
    losses = model(batch.tokens.to(device), batch.position_ids.to(device), None, labels=batch.labels.to(device))
    return losses, partial(loss, loss_mask_BS=batch.loss_mask.to(device))
