"""Are the copies of an adapter on different ranks still the same bits?

Every factor exists on several ranks: over data parallelism all of them, over tensor parallelism those that are not split
and the parts that several ranks share. They get the same gradient, so they stay equal bit for bit, until a missing
reduction or a faulty device lets them drift apart; then what is saved is one rank's opinion.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megalora import host
from megalora.lora.factors import Piece
from megalora.lora.spec import Adapted, expected_tensors
from megalora.parallel import Groups

_BITS = {2: torch.int16, 4: torch.int32}
_KEPT = (1 << 62) - 1


def bit_hash(tensor: Tensor) -> Tensor:
    """A number below 2^62 (int64 scalar on the tensor's device) that any change of one element changes.

    The sum of all elements' bits, each times its own odd number, modulo 2^64. The lowest bits are kept: 62 of them, so that
    the negative exists, and an odd factor loses no difference there.
    """
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()]).long()
    places = torch.arange(bits.numel(), device=bits.device)
    return ((bits * (2 * places * 0x9E3779B97F4A7C1 + 1)).sum()) & _KEPT


class DriftCheck:
    """Compares a hash of every adapter tensor over its replicas, in one collective of 16 bytes for each shard of a tensor."""

    def __init__(self, adapted: list[Adapted], pieces: list[Piece], groups: Groups) -> None:
        self.names = list(expected_tensors(adapted))
        self.pieces, self.width = pieces, max(groups.tp.size(), groups.etp.size())
        number = {name: i for i, name in enumerate(self.names)}
        places = [number[piece.name] * self.width + piece.shard for piece in pieces]
        self.places = torch.tensor(places, dtype=torch.int64, device=host.device())

    def run(self, step: int, last_saved: Path | None) -> None:
        """Collective over the world; raises ``RuntimeError`` on every rank, with the names, when replicas differ."""
        largest = torch.full((2, len(self.names) * self.width), -_KEPT - 1, dtype=torch.int64, device=host.device())
        if self.pieces:
            mine = torch.stack([bit_hash(piece.of({piece.parameter: piece.parameter.data})) for piece in self.pieces])
            largest[:, self.places] = torch.stack([mine, -mine])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        held = largest[0] >= 0
        apart = (held & (largest[0] != -largest[1])).nonzero().flatten().tolist()
        if apart:
            names = list(dict.fromkeys(self.names[place // self.width] for place in apart))
            saved = f"the last checkpoint before is {last_saved}" if last_saved else "no checkpoint was saved before"
            raise RuntimeError(
                f"step {step}: {len(names)} of {len(self.names)} adapter tensors differ between ranks that hold the same part "
                f"of them: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. A gradient was not reduced everywhere (a bug; "
                f"please report it) or a device computes wrongly; {saved}. train.check_replicas_every=0 turns this check off."
            )
