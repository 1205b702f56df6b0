"""Fill codes and scales of a rank from a base folder: of every matrix its own part alone is read.

A matrix is quantised whole, or was when it was published, and cut afterwards: blocks that a cut
divides become several with the same scale. Every layout then has the same values, bit for bit.

Shape legend: N, K rows and columns of a whole matrix   n, k of a part   p, q rows and columns of a
scale in memory   P, Q those of a published block
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megalora_kernels import NF4, pack_nf4
from torch import Tensor, nn

from megalora.model.base_weights import BaseWeights
from megalora.model.formats.coded import NESTED_BLOCK, NF4_BLOCK
from megalora.model.held import modules_of
from megalora.model.held_codes import HeldCodes
from megalora.model.projections import Projection
from megalora.model.quantised import nf4
from megalora.model.quantised.part import Part, Stored, covering
from megalora.model.quantised.to_nf4 import (
    quantise,
    quantise_scales,
    scale_values,
    scales_of,
)
from megalora.model.shape import ModelShape
from megalora.parallel import megatron_groups


class _Run(NamedTuple):
    """Rows of a matrix that lie together in a rank's weight."""

    name: str
    """Published name of the matrix."""
    size: tuple[int, int]
    part: Part
    expert: int
    """Place among those of the rank; 0 for a dense linear."""
    first_row: int


class _Doubly(NamedTuple):
    """A run of nf4 whose scales are codes."""

    codes: Tensor
    """uint8 ``[n, k]``, one to a byte."""
    scale_codes: Tensor
    """uint8 ``[n, k / q]``."""
    block: Tensor
    """int64 ``[n, k / q]``: place of each scale among those of the flattened matrix."""
    second: Tensor
    """float32: all second scales of the matrix, one for ``num_blocks`` scales."""
    num_blocks: int
    offset: float
    values: Tensor
    """float32 ``[256]``: what codes of scales mean."""


def held_modules(
    chunks: list[nn.Module], shape: ModelShape
) -> Iterator[tuple[int, str, HeldCodes]]:
    """(layer, Megatron's module, its codes) of every weight that is held, before adapters are
    in."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:  # pyright: ignore
            number = layer.layer_number - 1
            for module in modules_of(shape, number):
                found = layer.get_submodule(module.rpartition(".")[0])
                found = getattr(found, module.rpartition(".")[2])
                found = getattr(found, "held", found)
                if isinstance(found, HeldCodes):
                    yield number, module, found


@torch.no_grad()
def load_held(
    weights: BaseWeights, chunks: list[nn.Module], shape: ModelShape, doubly: bool = False
) -> None:
    """Fill every held weight of this rank.

    Args:
        doubly: whether plain weights are quantised to nf4 doubly.
    Raises:
        ValueError: a stored matrix has another codebook or block size than what is held.
    """
    for layer, module, held in held_modules(chunks, shape):
        projections = modules_of(shape, layer)[module]
        held.mark_unwritten()
        for run in _runs(projections, shape, layer, held):
            if held.how.double is not None:
                codes = _read_nested(weights, run, held)
                held.codes[run.expert, run.first_row : run.first_row + len(codes)].copy_(codes)
                continue
            codes, scales = _read(weights, run, held, doubly)
            rows = slice(run.first_row, run.first_row + len(codes))
            p, q = held.how.grain
            if held.how.form == "nf4":
                # Packed after the cut, which may fall between the two codes of a published byte.
                codes = pack_nf4(codes, q)
            held.codes[run.expert, rows].copy_(codes)
            held.scales[run.expert, rows.start // p : rows.stop // p].copy_(scales)
        if problem := held.problem():
            raise ValueError(
                f"{weights.folder}: {problem} in {module} of layer {layer}; download the model"
                " again"
            )


@torch.no_grad()
def randomise_held(chunks: list[nn.Module], shape: ModelShape, generator: torch.Generator) -> None:
    """Codes drawn from all that are numbers, with scales that make values near 0.02."""
    for _, _, held in held_modules(chunks, shape):
        # Both halves of any byte are codes of nf4: all 256 will do.
        held.codes.random_(generator=generator)
        size = 0.02
        if held.how.form == "fp8":
            # Bytes without the highest bit of the exponent: below 2, and never NaN.
            held.codes.bitwise_and_(0b10111111)
        held.scales.fill_(size)
        if held.how.double is not None:
            held.scale_codes.random_(generator=generator)
        held.scratch.forget()


def _runs(
    projections: list[Projection], shape: ModelShape, layer: int, held: HeldCodes
) -> Iterator[_Run]:
    """All runs of a module on this rank, in the order of its rows."""
    first = projections[0]
    groups = megatron_groups()
    group = groups.expt_tp if first.is_expert else groups.tp
    count = held.sizes[0]
    for place in range(count):
        expert = groups.ep.rank() * count + place if first.is_expert else None
        at = 0
        for projection, n0, n1 in _rows(projections, shape, group.rank(), group.size()):
            size = projection.features(shape)
            columns = (0, size[1])
            if first.kind.endswith("row"):
                width = size[1] // group.size()
                columns = (group.rank() * width, (group.rank() + 1) * width)
            name = f"{projection.hf.format(layer=layer, expert=expert)}.weight"
            yield _Run(name, size, Part(n0, n1, *columns), place, at)
            at += n1 - n0
        assert at == held.sizes[1], f"{first.module}: {at} rows of {held.sizes[1]}"


def _rows(
    projections: list[Projection], shape: ModelShape, rank: int, ranks: int
) -> Iterator[tuple[Projection, int, int]]:
    """(projection, first row, row after the last) of a rank's fused weight, from the top."""
    if projections[0].kind.endswith("row"):
        yield projections[0], 0, projections[0].features(shape)[0]
        return
    if len(projections) < 3:
        # Megatron's gate and up of a rank: its rows of the one, then its rows of the other.
        for projection in projections:
            rows = projection.features(shape)[0] // ranks
            yield projection, rank * rows, (rank + 1) * rows
        return
    q, k, v = projections
    # With more ranks than key/value heads neighbouring groups share a head.
    groups = max(shape.num_kv_heads, ranks)
    q_rows = shape.num_heads // groups * shape.head_dim
    for group in range(rank * groups // ranks, (rank + 1) * groups // ranks):
        yield q, group * q_rows, (group + 1) * q_rows
        head = group * shape.num_kv_heads // groups
        for projection in (k, v):
            yield projection, head * shape.head_dim, (head + 1) * shape.head_dim


def _read(weights: BaseWeights, run: _Run, held: HeldCodes, doubly: bool) -> tuple[Tensor, Tensor]:
    """(codes ``[n, k]``, one to a byte, scales ``[n / p, k / q]``) of a run."""
    stored = weights.stored(run.name)
    if stored is None:
        return _quantised(weights, run, held.how.grain[1], doubly)
    if held.how.form == "fp8":
        return _fp8(stored, run.part, held.how.grain, weights.block)
    try:
        return _nf4(stored, run, held.how.grain[1])
    except ValueError as error:
        raise ValueError(f"{weights.folder}: {run.name}: {error}") from None


def _fp8(
    stored: Stored, part: Part, grain: tuple[int, int], block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    n0, n1, k0, k1 = part
    # Scales of every block that the part touches, of which a fine grid repeats some.
    touched = stored["weight_scale_inv"][covering(n0, n1, block[0]), covering(k0, k1, block[1])]
    rows = torch.arange(n0, n1, grain[0]) // block[0] - n0 // block[0]
    columns = torch.arange(k0, k1, grain[1]) // block[1] - k0 // block[1]
    codes = stored["weight"][n0:n1, k0:k1].view(torch.uint8)
    return codes, touched.float()[rows][:, columns]


def _nf4(stored: Stored, run: _Run, q: int) -> tuple[Tensor, Tensor]:
    codes, block_of, blocks, state = nf4.codes_of(stored, run.part, run.size)
    _check_nf4(stored, state)
    # All of a block of memory lies in one published block.
    return codes, nf4.absmax(stored, blocks, state)[block_of[:, ::q]]


def _check_nf4(stored: Stored, state: dict[str, Any]) -> None:
    # q divides 64, n K and k: no block of memory crosses two published ones if 64 divides theirs.
    if state["blocksize"] % NF4_BLOCK:
        raise ValueError(
            f"it is quantised in blocks of {state['blocksize']}, and in memory blocks have"
            f" {NF4_BLOCK}: use model.weight_format=plain"
        )
    # Whoever decodes takes the constant NF4, whatever a file says.
    if not torch.equal(stored["weight.quant_map"][...].float(), torch.tensor(NF4)):
        raise ValueError("its quant_map is not that of nf4: use model.weight_format=plain")


def _read_nested(weights: BaseWeights, run: _Run, held: HeldCodes) -> Tensor:
    """Packed codes of a run, whose scales' codes are written where they belong."""
    stored = weights.stored(run.name)
    double = held.how.double
    q = held.how.grain[1]
    nested = held.nested
    try:
        found = _made_doubly(weights, run, q) if stored is None else _stored_doubly(stored, run, q)
        # All matrices of a fused weight have one table in memory.
        if nested.values[0].isnan():
            nested.values.copy_(found.values)
        elif not torch.equal(nested.values.cpu(), found.values):
            raise ValueError("its nested_quant_map is another: use model.weight_format=plain")
    except ValueError as error:
        raise ValueError(f"{weights.folder}: {run.name}: {error}") from None
    rows = slice(run.first_row, run.first_row + len(found.codes))
    held.scale_codes[run.expert, rows].copy_(found.scale_codes)
    # Of each second scale one block says which it is.
    second = found.block[:: double.rows, :: double.scales] // found.num_blocks
    _part(nested.scales[run.expert], rows, double.rows).copy_(found.second[second])
    _part(nested.offsets[run.expert], rows, double.run).fill_(found.offset)
    return pack_nf4(found.codes, q)


def _stored_doubly(stored: Stored, run: _Run, q: int) -> _Doubly:
    """A run of a matrix that the folder stores doubly quantised; raises ``ValueError`` where its
    blocks do not fit those of memory."""
    codes, block_of, blocks, state = nf4.codes_of(stored, run.part, run.size)
    _check_nf4(stored, state)
    span = state["blocksize"] * state["nested_blocksize"]
    if span % (NF4_BLOCK * NESTED_BLOCK):
        raise ValueError(
            f"a scale of its scales is for {span} weights, and in memory for"
            f" {NF4_BLOCK * NESTED_BLOCK}: use model.weight_format=plain"
        )
    place = block_of[:, ::q]
    return _Doubly(
        codes=codes,
        scale_codes=stored["weight.absmax"][blocks][place],
        block=place + blocks.start,
        second=stored["weight.nested_absmax"][...],
        num_blocks=state["nested_blocksize"],
        offset=state["nested_offset"],
        values=stored["weight.nested_quant_map"][...].float(),
    )


def _made_doubly(weights: BaseWeights, run: _Run, q: int) -> _Doubly:
    """A run of a plain matrix, doubly quantised: its scales' mean and blocks are of all of it."""
    whole = weights.part(run.name, Part.whole(run.size))
    scales = quantise_scales(scales_of(whole))
    codes, blocks = _quantise_part(whole, run.part, q)
    rows = torch.arange(run.part.n0, run.part.n1)[:, None]
    return _Doubly(
        codes=codes,
        scale_codes=scales.codes[rows, blocks],
        block=rows * scales.codes.shape[1] + blocks,
        second=scales.scales,
        num_blocks=NESTED_BLOCK,
        offset=scales.offset,
        values=scale_values(),
    )


def _part(whole: Tensor, rows: slice, size: int) -> Tensor:
    """What lies there for rows of the weight, of which ``size`` share a row of it."""
    return whole[rows.start // size : rows.stop // size]


def _quantised(weights: BaseWeights, run: _Run, q: int, doubly: bool) -> tuple[Tensor, Tensor]:
    """Quantise a plain matrix to nf4, as bitsandbytes does where 64 divides its columns, and cut.

    Only the part is read, with its columns widened to whole blocks; all of the matrix where its
    scales are quantised, too.

    Returns:
        codes ``[n, k]`` of the part, one to a byte, and float32 scales ``[n, k / q]``.
    """
    n0, n1, k0, k1 = run.part
    if doubly:
        whole = weights.part(run.name, Part.whole(run.size))
        codes, blocks = _quantise_part(whole, run.part, q)
        return codes, quantise_scales(scales_of(whole)).decoded()[n0:n1, blocks]
    first, end = _widened(run.part, run.size[1])
    codes, absmax = quantise(weights.part(run.name, Part(n0, n1, first, end)))
    blocks = _blocks_of(run.part, q) - first // NF4_BLOCK
    return codes[:, k0 - first : k1 - first], absmax[:, blocks]


def _quantise_part(w_NK: Tensor, part: Part, q: int) -> tuple[Tensor, Tensor]:
    """Codes ``[n, k]`` of a part of a whole matrix, and its blocks ``[k / q]`` of a row."""
    n0, n1, k0, k1 = part
    first, end = _widened(part, w_NK.shape[1])
    codes, _ = quantise(w_NK[n0:n1, first:end])
    return codes[:, k0 - first : k1 - first], _blocks_of(part, q)


def _widened(part: Part, columns: int) -> tuple[int, int]:
    """First column, and column after the last, of the whole blocks that a part touches."""
    # The largest value of part of a block would be another scale than that of the whole.
    first = part.k0 // NF4_BLOCK * NF4_BLOCK
    return first, min(columns, -(-part.k1 // NF4_BLOCK) * NF4_BLOCK)


def _blocks_of(part: Part, q: int) -> Tensor:
    """Of each block of memory in a row the published block that it lies in."""
    # q divides 64 and k0, so that each lies in one of 64 columns.
    return torch.arange(part.k0, part.k1, q) // NF4_BLOCK
