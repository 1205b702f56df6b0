"""Are the copies of an adapter on different ranks still the same bits?

Every factor exists on several ranks: over data parallelism all of them, over tensor parallelism
those that are not split and the parts that several ranks share. They get the same gradient, so they
stay equal bit for bit, until a missing reduction or a faulty device lets them drift apart; then
what is saved is one rank's opinion.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.lora.shards import FactorShard
from megalora.lora.spec import Adapted, FactorName, expected_tensors, tensor_name
from megalora.parallel import Groups
from megalora.wording import first_few

_BITS = {2: torch.int16, 4: torch.int32}
_KEPT = (1 << 62) - 1
_AT_ONCE = 1 << 22
"""Elements hashed at once: each needs 24 bytes of temporaries."""


def bit_hash(tensor: Tensor) -> Tensor:
    """A number below 2^62 (int64 scalar on the tensor's device) that any change of one element
    changes.

    The sum of all elements' bits, each times its own odd number, modulo 2^64. The lowest bits are
    kept: 62 of them, so that the negative exists, and an odd factor loses no difference there.
    """
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _AT_ONCE):
        part = bits[start : start + _AT_ONCE].long()
        places = torch.arange(start, start + part.numel(), device=bits.device)
        total += (part * (2 * places * 0x9E3779B97F4A7C1 + 1)).sum()
    return total & _KEPT


class DriftCheck:
    """Compares a hash of every adapter parameter over its replicas, in one collective of 16 bytes
    for each.

    A parameter holds many of the adapter's tensors, one those of all experts of a rank: 48 layers
    of 128 experts have 36,864 tensors in 600 parameters. Only when a parameter differs are its
    tensors hashed one by one, to name those that do.
    """

    def __init__(self, adapted: list[Adapted], pieces: list[FactorShard], groups: Groups) -> None:
        self.names = list(expected_tensors(adapted))
        self.pieces, self.width = pieces, max(groups.tp.size(), groups.etp.size())
        number = {name: i for i, name in enumerate(self.names)}
        self.tensor_places = _on_device(
            [number[piece.name] * self.width + piece.shard for piece in pieces]
        )
        # Replicas hold the same tensors in the same order, so that the first stands for the
        # parameter.
        first: dict[nn.Parameter, FactorShard] = {}
        for piece in pieces:
            first.setdefault(piece.parameter, piece)
        self.parameters = list(first)
        factors: tuple[FactorName, ...] = ("A", "B")
        projection = {
            tensor_name(module, factor): 2 * i + j
            for i, a in enumerate(adapted)
            for module in a.hf_modules()
            for j, factor in enumerate(factors)
        }
        num_shares = groups.ep.size()
        share = groups.ep.rank()
        places = [
            (projection[piece.name] * num_shares + (share if parameter.dim() == 3 else 0))
            * self.width
            + piece.shard
            for parameter, piece in first.items()
        ]
        self.parameter_places, self.num_places = (
            _on_device(places),
            2 * len(adapted) * num_shares * self.width,
        )

    def run(self, step: int, last_saved: Path | None) -> None:
        """Collective over the world; raises ``RuntimeError`` on every rank, with the names, when
        replicas differ."""
        whole = [parameter.data for parameter in self.parameters]
        if not bool(_differ(whole, self.parameter_places, self.num_places).any()):
            return
        parts = [piece.of({piece.parameter: piece.parameter.data}) for piece in self.pieces]
        apart = (
            _differ(parts, self.tensor_places, len(self.names) * self.width)
            .nonzero()
            .flatten()
            .tolist()
        )
        names = list(dict.fromkeys(self.names[place // self.width] for place in apart))
        saved = (
            f"the last checkpoint before is {last_saved}"
            if last_saved
            else "no checkpoint was saved before"
        )
        raise RuntimeError(
            f"step {step}: {len(names)} of {len(self.names)} adapter tensors differ between ranks"
            " that hold the same part of them:"
            f" {first_few(names, 5)}. A gradient was not"
            f" reduced everywhere (a bug; please report it) or a device computes wrongly; {saved}."
            " train.check_replicas_every=0 turns this check off."
        )


def _on_device(places: list[int]) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=host.device())


def _differ(tensors: list[Tensor], places: Tensor, num_places: int) -> Tensor:
    """bool ``[num_places]``: whether ranks whose tensors have the same place have other bits there;
    collective."""
    largest = torch.full((2, num_places), -_KEPT - 1, dtype=torch.int64, device=host.device())
    if tensors:
        mine = torch.stack([bit_hash(tensor) for tensor in tensors])
        largest[:, places] = torch.stack([mine, -mine])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    held = largest[0] >= 0
    return held & (largest[0] != -largest[1])
