"""Compare the loss of this layout with stock transformers' before the first step.

All data-parallel ranks evaluate one and the same microbatch, through their own pipeline, experts
and tensor-parallel shards; the first rank computes it again on its host with transformers (and
PEFT, when a run is resumed and its adapter is not zero any more). Each rank's loss is compared, not
their mean: one wrong rank of 64 must not be averaged away.

The tolerance, relative to the loss, is what rounding explains with room to spare:

    float32   1e-5. Layouts differ by 1e-8 to 1e-7 in float32 (README); a swapped projection, a
              wrong rotary base or a lost norm weight changes the loss by 1e-3 and more.
    bfloat16  2e-2. 8 significant bits: a logit of size 10 is known to 1/64 after one rounding, and
              every layer rounds its residual stream several times. Tokens err independently, so the
              mean errs less; what is caught is a broken layer, what may pass is a slightly wrong
              one. Run the check once in float32 for a new model or layout.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalora.data.batch import Batch
from megalora.first_rank import on_first_rank
from megalora.model.quantised.scheme import UNROUNDED, Rounded
from megalora.model.shape import ModelShape
from megalora.verify.host_memory import free_host_memory_bytes
from megalora.verify.stock_model import load_stock
from megalora.verify.stock_peft import load_by_peft

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference relative to the loss, by the dtype of the run."""
_HEADROOM = 1.2
"""Host memory needed over that of the weights alone: the shard being read, activations, logits."""


def compare_losses(
    ours: float, batch: Batch, *, folder: Path, adapter: Path | None, dtype: str, shape: ModelShape,
    nf4: Rounded = UNROUNDED,
) -> str:  # fmt: skip
    """Compare every rank's loss of the batch with transformers'; collective over the world.

    Args:
        ours: this rank's mean loss over the target tokens of ``batch``, which is the same on all
            ranks.
        adapter: a PEFT folder to put on the base, None where B is zero.
        nf4: plain matrices that the run has quantised.
    Returns: a line for the user.
    Raises: ``RuntimeError`` on every rank when a loss is off; ``ValueError`` when the model does
        not fit the host's memory.
    """
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, ours)
    reference = on_first_rank(
        lambda: reference_loss(batch, folder, adapter, dtype, shape, nf4),
        f"train.check_base=loss: transformers cannot read {folder}",
    )
    worst = max(range(len(losses)), key=lambda rank: _relative(losses[rank], reference))
    difference = _relative(losses[worst], reference)
    allowed = TOLERANCE[dtype]
    # A NaN on any rank is the worst difference, and not within what is allowed.
    if not difference <= allowed:
        raise RuntimeError(
            f"train.check_base=loss: the loss of the first microbatch is {losses[worst]:.7f} on"
            f" rank {worst}, {reference:.7f} in transformers: they differ by {difference:.1e} of"
            f" it, {allowed:.0e} is allowed in {dtype}. This layout does not compute the model it"
            " was given; please report it. parallel.tp=1, pp=1, ep=1 tells whether the layout or"
            " the model is at fault."
        )
    return (
        f"base: loss of the first microbatch {losses[worst]:.7f}, transformers {reference:.7f}"
        f" (differ by {difference:.1e})"
    )


def _relative(loss: float, reference: float) -> float:
    """Difference over the reference; infinite for NaN, so that ``max`` finds it."""
    difference = abs(loss - reference) / reference
    return float("inf") if math.isnan(difference) else difference


@torch.no_grad()
def reference_loss(
    batch: Batch, folder: Path, adapter: Path | None, dtype: str, shape: ModelShape,
    nf4: Rounded = UNROUNDED,
) -> float:  # fmt: skip
    """Mean cross entropy over the batch's target tokens, by stock transformers on the host."""
    needed = shape.num_parameters() * {"float32": 4, "bfloat16": 2}[dtype] * _HEADROOM
    # Too much would end the process without a word, and with it the run.
    free = free_host_memory_bytes()
    if needed > free:
        raise ValueError(
            f"train.check_base=loss: {folder} in {dtype} needs {needed / 2**30:.1f} GiB of host"
            f" memory on the first rank, which has {free / 2**30:.1f} GiB free. Set"
            " train.check_base=layer, or check a smaller model of the family."
        )
    model: Any = load_stock(folder, getattr(torch, dtype), nf4=nf4).eval()
    if adapter is not None:
        model = load_by_peft(model, adapter)
    # Each document by itself, so that nothing of ours decides what a token sees.
    total = torch.zeros((), dtype=torch.float64)
    for start, end in pairwise(batch.ends):
        mask = batch.loss_mask[start:end]
        # Filler, and a document that is context alone.
        if not mask.any():
            continue
        # Labels are shifted already: position s of the row predicts labels[s].
        logits = model(batch.tokens[None, start:end]).logits[0].float()
        losses = F.cross_entropy(logits, batch.labels[start:end], reduction="none")
        total += (losses * mask).sum()
    return (total / batch.loss_mask.sum()).item()
