"""Bring a step's microbatches to the device in one copy, from page-locked memory and without
waiting for it.

Only what a pipeline stage reads travels: tokens to the first, labels and loss mask to the last. No
stage needs positions, because rotary embeddings count from 0 in every sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megalora import host
from megalora.data.loader import Batch


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """A microbatch on this rank's device; None where this pipeline stage has no use for it."""

    tokens: Tensor | None
    """[B, S] int64."""
    labels: Tensor | None
    """[B, S] int64."""
    loss_mask: Tensor | None
    """[B, S] float32."""


def to_device(batches: list[Batch], *, first: bool, last: bool) -> list[DeviceBatch]:
    """What the first and the last pipeline stage need of ``batches``.

    Token ids fit into int32, and a label outside of the loss travels as its complement, so that the
    mask needs no room: 8 bytes a token where a stage is both first and last.
    """
    rows: list[Tensor] = []
    for batch in batches:
        if first:
            rows.append(batch.tokens.reshape(-1))
        if last:
            # ~label is -label - 1: negative, and its own inverse.
            packed = torch.where(batch.loss_mask > 0, batch.labels, ~batch.labels)
            rows.append(packed.reshape(-1))
    # A middle stage gets its input from its neighbours.
    if not rows:
        return [DeviceBatch(None, None, None)] * len(batches)
    flat = host.to_device(torch.cat(rows).int())
    parts = iter(flat.split([row.numel() for row in rows]))
    return [_unpack(batch.tokens.shape, parts, first, last) for batch in batches]


def _unpack(shape: torch.Size, parts: Iterator[Tensor], first: bool, last: bool) -> DeviceBatch:
    """The next microbatch of those that ``to_device`` packed, on the device."""
    tokens = labels = loss_mask = None
    if first:
        tokens = next(parts).view(shape).long()
    if last:
        packed = next(parts).view(shape).long()
        in_loss = packed >= 0
        labels = torch.where(in_loss, packed, ~packed)
        loss_mask = in_loss.float()
    return DeviceBatch(tokens, labels, loss_mask)
