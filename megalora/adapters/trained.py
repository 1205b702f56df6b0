"""Bring a folder's adapter back to the form that training has, without the zeros that engines want.

A checkpoint says in its training state what was trained, and holds it in float32. For any other
folder the zeros have to be recognised: a rank whose row of A and column of B are zero for all
experts has no gradient and never will; nor has an expert whose A and B are both zero. So ranks at
the end that are zero everywhere are cut off, a projection of which nothing is left is not adapted,
and what is still zero in A then is drawn anew beside a B of zeros, which changes nothing yet.

Experts that all have the same A of gate and up, and the same B of down, share them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megalora.adapters.as_plain import as_plain
from megalora.adapters.cycles import read_cycles, state_folder, summed
from megalora.adapters.files import CONFIG, STATE_JSON, WEIGHTS
from megalora.adapters.read.adapter import Adapter
from megalora.adapters.saved_tensors import has_state
from megalora.adapters.training_state import read_factors, read_state
from megalora.adapters.write.form import export_form, matrix_dtype, peft_tensors
from megalora.adapters.write.stacks import factors_of
from megalora.lora.init import initial_a
from megalora.lora.section import differing, settings
from megalora.lora.spec import (
    FACTORS,
    OUTER,
    Adapted,
    has_biases,
    has_magnitudes,
    tensor_name,
)
from megalora.lora.trained_weight import trained_weights
from megalora.model.shape import ModelShape

SEED = 0
"""Seed of the A's that replace missing ones."""


@dataclass(frozen=True)
class TrainedForm:
    """An adapter as training has it."""

    adapter: Adapter
    notes: list[str]
    """Lines that say what was left out or filled in."""


def trained_form(adapter: Adapter, shape: ModelShape, *, fill: bool = False) -> TrainedForm:
    """The same function in the form that training has.

    Args:
        adapter: as read from its folder.
        fill: make every expert of a folder without training state able to learn.

    Raises:
        ValueError: every B is zero, or a checkpoint's files contradict each other.
    """
    is_checkpoint = (adapter.folder / STATE_JSON).is_file() and has_state(adapter.folder)
    # No engine wants zeros beside biases, which act without B, too.
    if has_biases(adapter.adapted) and not is_checkpoint:
        return TrainedForm(adapter, [])
    if is_checkpoint:
        form = _of_checkpoint(adapter, shape)
    else:
        form = _without_padding(adapter, fill)
        # What is trained whole has no zeros that mean nothing.
        for weight in trained_weights(adapter.shape_of(shape)):
            form.adapter.tensors[weight.tensor] = adapter.tensors[weight.tensor]
    tensors = form.adapter.tensors
    # A magnitude acts without B, and so does a bias.
    acts = has_magnitudes(form.adapter.adapted) or bool(form.adapter.biases)
    if not acts and not any(tensors[name].any() for name in tensors if ".lora_B." in name):
        raise ValueError(f"{adapter.folder}: every B is zero: this adapter does nothing")
    return form


def _of_checkpoint(adapter: Adapter, shape: ModelShape) -> TrainedForm:
    """What was trained, as the training state has it, in the dtype of the adapter's file."""
    state = read_state(adapter.folder)
    adapted = state.trained(shape)
    own = adapter.shape_of(shape)
    whole = trained_weights(own)
    # The optimizer's file holds the head too, of as many rows.
    if state.num_scores != adapter.num_scores:
        raise _contradiction(adapter, f"{WEIGHTS} has {adapter.num_scores} scores")
    if state.shape_of(shape) != own:
        raise _contradiction(adapter, f"{CONFIG} saves other modules or tokens of the base")
    dtypes: dict[str, torch.dtype] = {}
    for a in adapted:
        for expert, module in enumerate(a.hf_modules()):
            for factor in a.factors:
                # A0 and B0 have no names of their own in the file.
                row = FACTORS[factor]
                name = tensor_name(module, factor if row.trained else row.like)
                if name not in adapter.tensors:
                    raise _contradiction(adapter, f"{WEIGHTS} lacks {name}")
                dtypes[a.tensor_name(factor, expert)] = adapter.tensors[name].dtype
    for weight in whole:
        dtypes[weight.tensor] = adapter.tensors[weight.tensor].dtype
    tensors = read_factors(adapter.folder, adapted, dtypes, whole)
    # The training state has the last cycle's adapter alone, the adapter's files the sum.
    if state.cycles:
        earlier = read_cycles(state_folder(adapter.folder), state.cycles, adapted)
        adapted, tensors = summed(adapted, earlier, tensors)
    adapted, tensors = as_plain(adapted, tensors)
    # The adapter's files were written from these factors: writing them once more must give the
    # same, or somebody changed one of the two.
    pairs = export_form(adapted, shape)
    if apart := differing(settings([w for w, _ in pairs]), settings(adapter.adapted)):
        raise _contradiction(adapter, f"{apart[0]} has another rank or scale in {CONFIG}")
    written = dict(peft_tensors(pairs, tensors.__getitem__, matrix_dtype(tensors)))
    for weight in whole:
        written[weight.tensor] = tensors[weight.tensor]
    for name, tensor in written.items():
        if not torch.equal(tensor, adapter.tensors[name]):
            raise _contradiction(adapter, f"{name} has other values in {WEIGHTS}")
    return TrainedForm(replace(adapter, adapted=adapted, tensors=tensors), [])


def _contradiction(adapter: Adapter, what: str) -> ValueError:
    """The error for a checkpoint whose adapter is not that of its training state."""
    return ValueError(
        f"{adapter.folder}: its adapter is not the one that its training state holds: {what}. One"
        f" of them was changed after it was saved. To take the adapter as it is, copy {CONFIG} and"
        f" {WEIGHTS} to a folder without {STATE_JSON.parent}"
    )


def _without_padding(adapter: Adapter, fill: bool) -> TrainedForm:
    """The adapter without ranks and projections that are zero everywhere."""
    adapted: list[Adapted] = []
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    if shares := _experts_share(adapter):
        notes.append("experts share A of gate and up and B of down: lora.share_outer")
    for a in adapter.adapted:
        a_Eri, b_Eor = factors_of(a, adapter.tensors)
        # From here on the factor has one name; the file has a copy for each expert.
        if shares and a.projection.is_expert:
            a = replace(a, shared=OUTER[a.projection.kind])
        # A rank is alive in an expert where its row of A or its column of B is not zero.
        alive_Er = a_Eri.abs().amax(2).bool() | b_Eor.abs().amax(1).bool()
        used = alive_Er.any(0).nonzero()
        has_magnitude = "M" in a.factors
        # As ``bias=lora_only`` says, a linear with a trained bias has an adapter.
        if not len(used) and not has_magnitude and a.hf_module(0) not in adapter.biases:
            notes.append(f"{_label(a)}: zeros, not adapted")
            continue
        # Padding is at the end: zeros in front of a living rank are not, and stay.
        rank = int(used[-1]) + 1 if len(used) else a.rank
        if rank < a.rank:
            idle = a.rank - rank
            notes.append(f"{_label(a)}: rank {rank}; {idle} of {a.rank} are zeros in the file")
        adapted.append(replace(a, rank=rank, alpha=a.scale * rank))
        # An A row of zeros gives its B column no gradient, and adds nothing: with a fresh row and a
        # zero column it can learn.
        idle_Er = ~a_Eri[:, :rank].abs().amax(2).bool()
        if a.shared == "B":
            # Other experts may use the column: beside it a row of zeros does learn.
            idle_Er &= ~b_Eor[..., :rank].abs().amax(1).bool()
        if fill and idle_Er.any():
            whole = int(idle_Er.all(1).sum())
            notes.append(
                f"{_label(a)}: {int(idle_Er.sum())} rows of A are zeros ({whole} of {len(idle_Er)}"
                " linears whole); drawn anew, B zero"
            )
        for place in range(len(a_Eri)):
            own_a = a_Eri[place, :rank].clone()
            own_b = b_Eor[place, :, :rank].clone()
            if fill:
                _draw_idle(a, place, idle_Er[place], own_a, own_b)
            # Of a shared factor every expert gives the same.
            tensors[a.tensor_name("A", place)] = own_a
            tensors[a.tensor_name("B", place)] = own_b
            if has_magnitude:
                name = a.tensor_name("M", place)
                tensors[name] = adapter.tensors[name]
    return TrainedForm(replace(adapter, adapted=adapted, tensors=tensors), notes)


def _label(a: Adapted) -> str:
    return a.name if a.layer is None else f"layer {a.layer} {a.name}"


def _draw_idle(a: Adapted, place: int, idle_r: Tensor, own_a: Tensor, own_b: Tensor) -> None:
    """Draw the idle rows of an expert's A anew, beside columns of zeros in its B."""
    if idle_r.any():
        drawn = initial_a(SEED, a.factor_module("A", place), len(own_a), a.in_features)
        own_a[idle_r] = drawn.to(own_a)[idle_r]
        own_b[:, idle_r] = 0


def _experts_share(adapter: Adapter) -> bool:
    """Whether the experts of every layer share the factors that ``OUTER`` names, to the bit."""
    found = False
    for a in adapter.adapted:
        if a.num_experts < 2:
            continue
        # With DoRA none do (``lora.share_outer``).
        if "M" in a.factors:
            return False
        a_Eri, b_Eor = factors_of(a, adapter.tensors)
        outer = a_Eri if OUTER[a.projection.kind] == "A" else b_Eor
        if not (outer == outer[:1]).all():
            return False
        # Zeros beside what was trained say nothing.
        found |= bool(outer.any())
    return found
