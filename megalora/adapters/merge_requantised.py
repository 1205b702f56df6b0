"""Merge an adapter into a quantised base in the base's own form, where somebody asks for it.

    W' = encode(W + s B A)

W is the original's weight, from which the base was made, or without it the base's decoded one. The
latter lies on the grid already: a delta below half a step of it rounds away, and survives where it
is larger. So what survived of each module's delta is measured, and decides (``MergeReport``).

Nothing changes its size or place: the base's files are copied, and the bytes of adapted weights are
written over. Memory holds the adapter and one matrix.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megalora.adapters.merge import copied_files, one_thread, products
from megalora.adapters.merge_original import merged_into
from megalora.adapters.merge_report import MergedModule, MergeReport, measured
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.read.linears import Adapter
from megalora.adapters.trained_on import notes_on_base
from megalora.atomic_folder import check_new, check_space, whole_or_gone
from megalora.hf.folder import local_folder, weight_shards
from megalora.lora.row_lengths import with_lengths
from megalora.lora.spec import has_biases, tensor_name
from megalora.model.account import BaseFolder, open_folder
from megalora.model.base_weights import DTYPES, BaseWeights
from megalora.model.quantised.decode import decode
from megalora.model.quantised.encode import ENCODED, encode
from megalora.model.quantised.part import Part
from megalora.model.quantised.scheme import Scheme
from megalora.model.stored_tensors import Place, Quantised

type Bytes = tuple[str, int, Tensor]
"""(shard, first byte in it, what is written there)."""


def merge_requantised(
    adapter: Path, base: str, out: Path, original: str | None = None, *, allow_loss: bool = False
) -> MergeReport:
    """Write a quantised ``base`` with ``adapter`` merged into it, in the base's own form, to the
    new folder ``out``.

    Args:
        original: folder or hub name of the model that the base was made from; None to take the
            base's decoded weights, into which only large deltas can be merged.
        allow_loss: whether less than ``SURVIVES`` of a delta is no error.

    Raises:
        ValueError: the base is not quantised as fp8 or nf4; the adapter does not fit, or trains
            more than linears; or too little survived. Nothing is left behind.
    """
    folder = local_folder(base, "--base")
    out = out.resolve()
    check_new(out, folder)
    opened = open_folder(folder)
    scheme = _checked(opened)
    read = read_adapter(adapter, opened.shape, base=folder)
    _check_linears_alone(read)
    weights = BaseWeights(opened)
    source = weights
    notes = notes_on_base(adapter, folder)
    if original is not None:
        found, _ = merged_into(folder, opened.shape, original)
        source = BaseWeights(open_folder(found))
    about = "the base's decoded weights" if original is None else original
    notes.append(
        f"W' = {scheme.title} of ({about} + delta); survived is what of the delta is in it"
    )
    files = [*(folder / name for name in weight_shards(folder)), *copied_files(folder)]
    check_space(out, sum(path.stat().st_size for path in files))
    with whole_or_gone(out) as temporary, one_thread():
        for path in files:
            shutil.copyfile(path, temporary / path.name)
        merged: list[MergedModule] = []
        for a in read.adapted:
            for module in a.hf_modules():
                row, parts = _merged(module, a.scale, read, opened, scheme, weights, source)
                merged.append(row)
                _write(temporary, parts)
        num_bytes = sum((temporary / name).stat().st_size for name in weight_shards(folder))
        report = MergeReport(adapter, base, out, num_bytes, tuple(merged), (*read.notes, *notes))
        report.write(temporary, allow_loss=allow_loss)
    return report


def _check_linears_alone(adapter: Adapter) -> None:
    if adapter.saved or adapter.tokens or adapter.biases or has_biases(adapter.adapted):
        raise ValueError(
            f"--requantise: {adapter.folder} trains more than A and B of linears (modules_to_save,"
            " trainable_token_indices or biases); merge into the original without it"
        )


def _checked(base: BaseFolder) -> Scheme:
    """How the base is quantised; raises ``ValueError`` for what cannot be written."""
    if base.scheme is None:
        raise ValueError(f"--requantise: {base.folder} is not quantised; leave it out")
    if base.scheme.form not in ENCODED:
        raise ValueError(
            f"--requantise writes {' and '.join(ENCODED)}, and {base.folder} is"
            f" {base.scheme.title}; merge into the original without it"
        )
    return base.scheme


@torch.no_grad()
def _merged(
    module: str, scale: float, adapter: Adapter, base: BaseFolder, scheme: Scheme,
    weights: BaseWeights, source: BaseWeights,
) -> tuple[MergedModule, list[Bytes]]:  # fmt: skip
    """One linear with its delta: what survived of it, and what is written where."""
    place = base.places[f"{module}.weight"]
    w_OI = source[f"{module}.weight"].float()
    factors = adapter.tensors
    a_RI, b_OR = (factors[tensor_name(module, name)].float() for name in ("A", "B"))
    delta_OI = scale * (b_OR @ a_RI)
    m_O = factors.get(tensor_name(module, "M"))  # of DoRA alone
    if m_O is not None:
        delta_OI = with_lengths(w_OI + delta_OI, m_O) - w_OI
    if place.quantised is None:
        dtype = DTYPES[place.tensor.dtype]
        values = (w_OI + delta_OI).to(dtype)
        sums = products(w_OI, delta_OI, values.float())
        row = measured(module, str(dtype).removeprefix("torch."), sums.tolist())
        return row, [_plain_bytes(place, values)]
    # Where nothing is added, the published codes stay to the bit.
    if not delta_OI.any():
        return MergedModule(module, scheme.form, 0.0, None, None), []
    stored = weights.stored(f"{module}.weight")
    assert stored is not None
    before = {ending: part[...] for ending, part in stored.items()}
    try:
        after = before | encode(scheme, w_OI + delta_OI, before)
    except ValueError as error:
        raise ValueError(f"--requantise: {base.folder}: {module}: {error}") from None
    size = place.quantised.size
    # By our own decoder, which training uses: what counts is what will be computed with.
    values = decode(scheme, after, Part.whole(size), size)
    row = measured(module, scheme.form, products(w_OI, delta_OI, values).tolist())
    return row, list(_coded_bytes(place.quantised, before, after))


def _plain_bytes(place: Place, values: Tensor) -> Bytes:
    """A matrix that the folder stores plain, maybe as rows of a tensor of all experts."""
    start = place.tensor.start
    if place.expert is not None and place.rows is not None:
        row_bytes = values.shape[1] * values.itemsize
        start += (place.expert * place.tensor.shape[-2] + place.rows[0]) * row_bytes
    return place.shard, start, values


def _coded_bytes(
    quantised: Quantised, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[Bytes]:
    """The stored tensors of a matrix that have changed."""
    for ending, part in quantised.parts.items():
        new = after[ending]
        if new is before[ending]:
            continue
        shapes = (new.shape, before[ending].shape)
        assert new.dtype == before[ending].dtype and shapes[0] == shapes[1], (ending, shapes)
        yield part.shard, part.tensor.start, new


def _write(folder: Path, parts: list[Bytes]) -> None:
    for shard, start, values in parts:
        with (folder / shard).open("r+b") as file:
            file.seek(start)
            file.write(values.contiguous().view(torch.uint8).numpy())
