"""Every decoder against the library that defines its form or plain loops: the whole matrix, and
every part of it bit for bit."""

import functools
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.model.quantised import awq, fp8, gptq, int4, mxfp4, nf4, nvfp4
from megalora.model.quantised.part import Part, Stored
from tests.oracles import quantised as oracle

type Decode = Callable[[Stored, Part, tuple[int, int]], Tensor]

DECODERS: dict[str, Decode] = {
    "fp8": lambda stored, part, size: fp8.decode(stored, part, (128, 128)),
    "nf4": nf4.decode,
    "int4": lambda stored, part, size: int4.decode(stored, part, oracle.GROUP, size),
    "int4 rows": lambda stored, part, size: int4.decode(stored, part, size[1], size),
    "gptq": lambda stored, part, size: gptq.decode(stored, part, oracle.GROUP, 1),
    "gptq_v2": lambda stored, part, size: gptq.decode(stored, part, oracle.GROUP, 0),
    "awq": lambda stored, part, size: awq.decode(stored, part, oracle.GROUP),
    "nvfp4": lambda stored, part, size: nvfp4.decode_compressed(stored, part),
    "mxfp4": lambda stored, part, size: mxfp4.decode(stored, part),
    "modelopt": lambda stored, part, size: nvfp4.decode_modelopt(stored, part),
}


def decoder_of(form: str) -> Decode:
    """The decoder of one of the oracle's forms, whose names begin with the decoder's."""
    first = form.replace(",", "").split()[0]
    return DECODERS[form] if form in DECODERS else DECODERS[first]


def labelled(rows: int, columns: int) -> Tensor:
    """A matrix whose entries say which row and column they are of, through any rounding of a
    group: each row has a size of its own, and signs and sizes in it differ by column."""
    size = 1 + torch.arange(rows)[:, None] / 16
    column = torch.arange(columns)
    wave = torch.sin(1.7 * column) + 0.3 * torch.cos(
        0.37 * column * (1 + torch.arange(rows)[:, None])
    )
    return 0.02 * size * wave


SIZE_OF_FP8 = (208, 160)
"""One block and a ragged one each way."""
SIZE = (24, 96)
"""Three groups of 32; blocks of 64 go over the ends of rows."""


@functools.cache
def written(form: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    size = SIZE_OF_FP8 if form.startswith("fp8") else SIZE
    return oracle.FORMS[form](labelled(*size).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", oracle.FORMS)
def test_values_are_those_of_the_library(form: str, dtype: torch.dtype) -> None:
    """Computed in float32 and rounded once."""
    stored, expected = written(form, dtype)
    size = tuple(expected.shape)
    values = decoder_of(form)(stored, Part.whole(size), size)  # pyright: ignore[reportArgumentType]
    assert values.dtype == torch.float32 and values.shape == size
    assert torch.equal(values.to(expected.dtype), expected)
    # The library itself is near what it was given: 0.13 of it at 4 bits.
    given = labelled(*size)
    assert (expected.float() - given).norm() < 0.15 * given.norm()


class Counting:
    """A stored tensor that counts the elements that are read of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.read = 0

    def __getitem__(self, index: Any) -> Tensor:
        found = self.tensor[index]
        self.read += found.numel()
        return found


CUTS = {
    "ends": (0.0, 1.0),
    "halves": (0.0, 0.5, 1.0),
    "thirds and less": (0.0, 0.01, 1 / 3, 0.4, 0.98, 1.0),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("form", oracle.FORMS)
def test_parts_are_those_of_the_whole(form: str, cut: str) -> None:
    """Bit for bit, wherever the matrix is cut: inside groups, words, bytes and blocks too."""
    stored, expected = written(form, torch.float32)
    size = (expected.shape[0], expected.shape[1])
    decode = decoder_of(form)
    whole = decode(stored, Part.whole(size), size)
    for n0, n1 in pairwise(round(share * size[0]) for share in CUTS[cut]):
        for k0, k1 in pairwise(round(share * size[1]) for share in CUTS[cut]):
            if n0 < n1 and k0 < k1:
                part = decode(stored, Part(n0, n1, k0, k1), size)
                assert torch.equal(part, whole[n0:n1, k0:k1])


PER_ELEMENT = {"weight": 1, "weight_packed": 2, "qweight": 8}
"""Codes in an element of the tensor that holds them, where the form does not say otherwise."""


@pytest.mark.parametrize("form", oracle.FORMS)
def test_no_more_is_read_than_a_part_needs(form: str) -> None:
    stored, expected = written(form, torch.float32)
    counted = {name: Counting(tensor) for name, tensor in stored.items()}
    # A multiple of 8 each way, which no word goes over.
    n0, n1, k0, k1 = 8, 16, 32, 64
    size = (expected.shape[0], expected.shape[1])
    decoder_of(form)(counted, Part(n0, n1, k0, k1), size)
    (name,) = PER_ELEMENT.keys() & stored.keys()
    codes = counted[name].read * size[0] * size[1] // stored[name].numel()
    # bitsandbytes' rows are read whole; GPTQ and AWQ pack along one side, which fits here.
    wanted = (n1 - n0) * (size[1] if form.startswith("nf4") else k1 - k0)
    assert codes == wanted
    for scales in ("weight_scale_inv", "weight_scale", "scales", "weight.absmax"):
        if scales in stored and stored[scales].numel() > 1:
            assert counted[scales].read < stored[scales].numel(), scales


def test_fp8_is_what_transformers_computes() -> None:
    """Where blocks divide the matrix; a ragged one it takes for blocks of another size, without a
    word."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    theirs = Fp8Dequantize(None)
    for rows, is_ragged in ((256, False), (192, True)):
        for scale_dtype in (torch.bfloat16, torch.float32):
            stored, _ = oracle.fp8(torch.randn(rows, 128), scale_dtype)
            found = fp8.decode(stored, Part(0, rows, 0, 128), (128, 128))
            for dtype in (torch.float32, torch.bfloat16):
                codes, scales = stored.values()
                same = torch.equal(theirs._dequantize_one(codes, scales, dtype), found.to(dtype))
                assert same != is_ragged


def test_mxfp4_is_what_transformers_reads_of_gpt_oss() -> None:
    """Its stacks, expert by expert: ``_blocks`` [E, N, K / 32, 16], ``_scales`` [E, N, K / 32]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 8, 4), generator=generator, dtype=torch.uint8)
    # [E, K, N]
    theirs = convert_moe_packed_tensors(blocks, scales)
    for expert in range(3):
        stored = {"weight_packed": blocks[expert].flatten(1), "weight_scale": scales[expert]}
        ours = mxfp4.decode(stored, Part(0, 8, 0, 128))
        assert torch.equal(ours.bfloat16().t(), theirs[expert])
    # No other test has the smallest exponent, whose power is subnormal, and NaN.
    edge = torch.tensor([[0, 255]], dtype=torch.uint8)
    packed = torch.full((1, 32), 0x22, dtype=torch.uint8)
    values = mxfp4.decode({"weight_packed": packed, "weight_scale": edge}, Part(0, 1, 0, 64))
    assert values[0, 0] == 2.0**-127 and values[0, 32:].isnan().all()


def test_odd_rows_of_nf4() -> None:
    """Of 33 columns every second row begins in the middle of a byte."""
    stored, expected = oracle.nf4(labelled(6, 33))
    for first, end in ((0, 6), (1, 4), (5, 6)):
        assert torch.equal(
            nf4.decode(stored, Part(first, end, 0, 33), (6, 33)), expected[first:end]
        )


def test_quant_state_of_another_matrix_is_refused() -> None:
    stored, _ = oracle.nf4(labelled(*SIZE))
    with pytest.raises(ValueError, match=r"nf4 matrix \[24, 96\], not of nf4 \[96, 24\]"):
        nf4.decode(stored, Part(0, 96, 0, 24), (96, 24))


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "its quant_state is not valid JSON"), ("[1, 2]", "is not a JSON object")],
)
def test_quant_state_that_is_no_object_is_refused(text: str, said: str) -> None:
    stored, _ = oracle.nf4(labelled(*SIZE))
    stored[nf4.STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=said):
        nf4.decode(stored, Part.whole(SIZE), SIZE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocksize": 128}, "weight.absmax has not the 18 scales"),
        ({"blocksize": 32}, "weight.absmax has not the 72 scales"),
        ({"blocksize": None}, "its quant_state has no blocksize"),
        ({"blocksize": 64.0}, "its quant_state has blocks of 64.0"),
        ({"nested_blocksize": 16}, "weight.nested_absmax has not the 3 scales"),
        ({"nested_offset": None}, "its quant_state has no nested_offset"),
        ({"nested_offset": "0"}, "its quant_state has the nested_offset '0'"),
    ],
)
def test_blocks_that_do_not_fit_the_scales_are_refused(change: dict[str, Any], said: str) -> None:
    stored, _ = oracle.nf4(labelled(*SIZE), nested="nested" in str(change))
    state = json.loads(bytes(stored[nf4.STATE].tolist())) | change
    state = {name: value for name, value in state.items() if value is not None}
    stored[nf4.STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=said):
        nf4.decode(stored, Part.whole(SIZE), SIZE)


def test_a_zero_point_that_writers_store_differently_is_refused() -> None:
    """Of 0, the first version of GPTQ's format has 15, or a borrow from the next one."""
    stored, _ = written("gptq", torch.float32)
    spoiled = stored | {"qzeros": torch.full_like(stored["qzeros"], -1)}
    with pytest.raises(ValueError, match="its qzeros hold 15, which in the first version"):
        DECODERS["gptq"](spoiled, Part.whole(SIZE), SIZE)
