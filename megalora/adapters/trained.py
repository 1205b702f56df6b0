"""From what a file holds back to what can train: without the zeros that engines want beside it.

A rank whose row of A and column of B are zero for all experts has no gradient and never will; nor
has an expert whose A and B are both zero. Files hold such zeros as padding. So ranks at the end
that are zero everywhere are cut off, a projection of which nothing is left is not adapted, and what
is still zero in A then is drawn anew beside a B of zeros, which changes nothing yet.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from megalora.adapters.read.adapter import Adapter
from megalora.adapters.write.form import factors_of
from megalora.lora.init import initial_a
from megalora.lora.spec import Adapted, tensor_name

SEED = 0
"""Of the A's that stand in for missing ones."""


@dataclass(frozen=True)
class TrainedForm:
    adapter: Adapter
    notes: list[str]
    """What was left out or filled in, a line each."""


def trained_form(adapter: Adapter, *, fill: bool = False) -> TrainedForm:
    """The same function in the form that training has; with ``fill``, every expert can learn.
    Raises ``ValueError`` for all zeros."""
    adapted: list[Adapted] = []
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for a in adapter.adapted:
        a_Eri, b_Eor = factors_of(a, adapter.tensors)
        alive_Er = a_Eri.abs().amax(2).bool() | b_Eor.abs().amax(1).bool()
        used = alive_Er.any(0).nonzero()
        where = a.name if a.layer is None else f"layer {a.layer} {a.name}"
        if not len(used):
            notes.append(f"{where}: zeros, not adapted")
            continue
        rank = int(used[-1]) + 1
        if rank < a.rank:
            notes.append(f"{where}: rank {rank}; {a.rank - rank} of {a.rank} are zeros in the file")
        adapted.append(replace(a, rank=rank, alpha=a.scale * rank))
        # An A row of zeros gives its B column no gradient, and adds nothing: with a fresh row and a
        # zero column it can learn.
        idle_Er = ~a_Eri[:, :rank].abs().amax(2).bool()
        if fill and idle_Er.any():
            whole = int(idle_Er.all(1).sum())
            notes.append(
                f"{where}: {int(idle_Er.sum())} rows of A are zeros ({whole} of {len(idle_Er)}"
                " linears whole); drawn anew, B zero"
            )
        for place, module in enumerate(a.hf_modules()):
            own_a = a_Eri[place, :rank].clone()
            own_b = b_Eor[place, :, :rank].clone()
            if fill and idle_Er[place].any():
                idle = idle_Er[place]
                own_a[idle] = initial_a(SEED, module, rank, a.in_features).to(own_a)[idle]
                own_b[:, idle] = 0
            tensors[tensor_name(module, "A")] = own_a
            tensors[tensor_name(module, "B")] = own_b
    if not any(tensors[name].any() for name in tensors if ".lora_B." in name):
        raise ValueError(f"{adapter.folder}: every B is zero: this adapter does nothing")
    return TrainedForm(replace(adapter, adapted=adapted, tensors=tensors), notes)
