"""Check that the copies of an adapter on different ranks are still the same bits.

Every factor exists on several ranks: over data parallelism all of them, over tensor parallelism
those that are not split and the parts that several ranks share. They get the same gradient, so they
stay equal bit for bit, until a missing reduction or a faulty device lets them drift apart; then
a checkpoint holds the values of one rank, and the others train on different ones.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.lora.shards import FactorShard
from megalora.lora.spec import FACTORS, Adapted, expected_tensors
from megalora.lora.trained_weight import TrainedWeight
from megalora.parallel import Groups
from megalora.wording import first_few

_BITS = {2: torch.int16, 4: torch.int32}
"""Integer dtype that has as many bytes as an element."""
_KEPT = (1 << 62) - 1
"""Mask of the lowest 62 bits."""
_AT_ONCE = 1 << 22
"""Elements hashed at once: each needs 24 bytes of temporaries."""


def bit_hash(tensor: Tensor) -> Tensor:
    """A number below 2^62 (int64 scalar on the tensor's device) that any change of one element
    changes.

    The sum of all elements' bits, each times its own odd number, modulo 2^64, of which the lowest
    62 bits are kept: a negative of such a number exists in int64. An element's difference d changes
    the sum by d times an odd number, which is no multiple of 2^62, as d has 32 bits at most.
    """
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _AT_ONCE):
        part = bits[start : start + _AT_ONCE].long()
        places = torch.arange(start, start + part.numel(), device=bits.device)
        # An odd number per place, spread over all 64 bits; int64 wraps around on overflow.
        total += (part * (2 * places * 0x9E3779B97F4A7C1 + 1)).sum()
    return total & _KEPT


class DriftCheck:
    """Compares a hash of every adapter parameter over its replicas, in one collective of 16 bytes
    for each.

    A parameter holds many of the adapter's tensors, one those of all experts of a rank: 48 layers
    of 128 experts have 36,864 tensors in 600 parameters. Only when a parameter differs are its
    tensors hashed one by one, to name those that do.
    """

    def __init__(
        self,
        adapted: list[Adapted],
        shards: list[FactorShard],
        groups: Groups,
        whole: Sequence[TrainedWeight] = (),
    ) -> None:
        self.names = list(expected_tensors(adapted, whole))
        self.shards = shards
        # No factor is cut into more parts than this, so (tensor, part) -> tensor * width + part is
        # a place of its own.
        self.width = max(groups.tp.size(), groups.etp.size())
        number = {name: i for i, name in enumerate(self.names)}
        tensor_places: list[int] = []
        first: dict[nn.Parameter, FactorShard] = {}
        for shard in shards:
            tensor_places.append(number[shard.name] * self.width + shard.shard)
            # Replicas hold the same tensors in the same order, so the first can stand for the
            # parameter.
            first.setdefault(shard.parameter, shard)
        self.tensor_places = _on_device(tensor_places)
        self.parameters = list(first)
        factor_number = _number_of_factors(adapted)
        for weight in whole:
            factor_number[weight.tensor] = len(FACTORS) * len(adapted) + whole.index(weight)
        num_shares = groups.ep.size()
        parameter_places: list[int] = []
        for shard in first.values():
            # Ranks of EP hold different experts in parameters of one name; dense ones, and what
            # experts share, are the same on all.
            share = groups.ep.rank() if shard.is_expert else 0
            place = (factor_number[shard.name] * num_shares + share) * self.width + shard.shard
            parameter_places.append(place)
        self.parameter_places = _on_device(parameter_places)
        num_groups = len(FACTORS) * len(adapted) + len(whole)
        self.num_places = num_groups * num_shares * self.width

    def run(self, step: int, last_saved: Path | None) -> None:
        """Collective over the world; raises ``RuntimeError`` on every rank, with the names, when
        replicas differ."""
        whole = [parameter.data for parameter in self.parameters]
        if not bool(_differ(whole, self.parameter_places, self.num_places).any()):
            return
        # Every rank knows that something differs, so every rank compares tensor by tensor.
        values = {parameter: parameter.data for parameter in self.parameters}
        parts = [shard.of(values) for shard in self.shards]
        differ = _differ(parts, self.tensor_places, len(self.names) * self.width)
        apart = differ.nonzero().flatten().tolist()
        # Several parts of one tensor may differ; its name is said once.
        names = list(dict.fromkeys(self.names[place // self.width] for place in apart))
        saved = "no checkpoint was saved before"
        if last_saved:
            saved = f"the last checkpoint before is {last_saved}"
        raise RuntimeError(
            f"step {step}: {len(names)} of {len(self.names)} adapter tensors differ between ranks"
            f" that hold the same part of them: {first_few(names, 5)}. A gradient was not reduced"
            f" everywhere (a bug; please report it) or a device computes wrongly; {saved}."
            " train.check_replicas_every=0 turns this check off."
        )


def _number_of_factors(adapted: list[Adapted]) -> dict[str, int]:
    """Tensor name -> number of its (projection of a layer, factor); all experts of a layer have
    one."""
    numbers: dict[str, int] = {}
    for i, a in enumerate(adapted):
        for factor in a.factors:
            for expert in range(max(1, a.num_experts)):
                place = len(FACTORS) * i + list(FACTORS).index(factor)
                numbers[a.tensor_name(factor, expert)] = place
    return numbers


def _on_device(places: list[int]) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=host.device())


def _differ(tensors: list[Tensor], places: Tensor, num_places: int) -> Tensor:
    """bool ``[num_places]``: whether ranks whose tensors have the same place have other bits there;
    collective."""
    # The maximum of h over ranks, and of -h, which is minus the minimum, in one collective. A place
    # that a rank does not hold starts below every hash and every negative of one.
    largest = torch.full((2, num_places), -_KEPT - 1, dtype=torch.int64, device=host.device())
    if tensors:
        mine = torch.stack([bit_hash(tensor) for tensor in tensors])
        largest[:, places] = torch.stack([mine, -mine])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    # Some rank holds the place, and the largest hash is not the smallest.
    held = largest[0] >= 0
    return held & (largest[0] != -largest[1])
