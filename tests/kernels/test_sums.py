"""Check the one launch that sums all parts of a backward pass: parts are added from first to last,
and each gradient has a tensor of its own."""

import pytest
import torch
import triton
from megalora_kernels import Routing
from megalora_kernels.sums import MAX_GRADIENTS, TorchSums, TritonSums

from tests.kernels.conftest import tiles
from tests.kernels.oracle import expert_of_rows

COUNTS = [0, 20, 0, 5, 16, 0]
CHUNK = 16
M = sum(COUNTS)
E = len(COUNTS)
# What experts leave in parts, at most: A of gate and up (stacked), A of down, B of gate, up and
# down. None: not wanted.
SHAPES = {
    "all": [(3, 24), (7, 40), (40, 3), (40, 5), (24, 7)],
    "some": [None, (7, 40), None, (40, 5), None],
    "one, wider than a block": [(40, 40)],
    "none": [None, None],
}


def chunks_of_experts() -> list[int]:
    """The expert of each chunk: a chunk has rows of one expert, so 20 rows are two chunks of 16."""
    num_chunks = [triton.cdiv(count, CHUNK) for count in COUNTS]
    return expert_of_rows(num_chunks)


@pytest.mark.usefixtures("uninitialised_is_nan", "any_order")
@pytest.mark.parametrize("with_dp", [False, True], ids=["weights alone", "dp too"])
@pytest.mark.parametrize("name", SHAPES)
def test_sums(name, with_dp, monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK_ROWS", CHUNK)
    g = torch.Generator().manual_seed(0)
    routing = Routing(torch.tensor(COUNTS).cumsum(0).int(), M)
    sums = TritonSums(routing, torch.empty(0), SHAPES[name])
    experts = chunks_of_experts()
    parts = []
    for shape in SHAPES[name]:
        part = None
        if shape is not None:
            part = torch.randn(len(experts), *shape, generator=g)
        parts.append(part)
    for place, part in zip(sums.places, parts, strict=True):
        if place is not None:
            # There is a place for every chunk that may occur; those beyond stay NaN, and nobody may
            # read them.
            place[: len(experts)] = part
    # Three parts of dp, as from three blocks of columns.
    dp_part = torch.randn(3, M, generator=g)
    if with_dp:
        sums.dp_part = dp_part
        sums.dp_dtype = torch.float16
    dp_M, found = sums.finish()
    for got, part in zip(found, parts, strict=True):
        if part is None:
            assert got is None
            continue
        want = torch.zeros(E, *part.shape[1:])
        # first to last, in float32: the same bits
        for e, values in zip(experts, part, strict=True):
            want[e] += values
        assert torch.equal(got, want) and got.is_contiguous()
    if with_dp:
        assert torch.equal(dp_M, (dp_part[0] + dp_part[1] + dp_part[2]).half())
    else:
        assert dp_M is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sum_is_rounded_once_at_its_end(dtype, monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK_ROWS", 1)
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    sums = TritonSums(
        Routing(torch.tensor([3], dtype=torch.int32), 3), torch.empty(0, dtype=dtype), [(1, 1)]
    )
    # Rounding after every addition would lose both halves of an ulp, one after the other.
    sums.places[0][:3, 0, 0] = torch.tensor([1.0, ulp, ulp])
    assert sums.finish()[1][0].item() == 1 + 2 * ulp


def test_parameters_get_gradients_that_autograd_need_not_copy():
    """Each is dense and in its parameter's own layout: autograd then takes it as it is."""
    sums = TritonSums(
        Routing(torch.tensor([2, 4], dtype=torch.int32), 4), torch.empty(0), SHAPES["all"]
    )
    assert len(SHAPES["all"]) == MAX_GRADIENTS
    torch_sums = TorchSums(sums.routing, torch.empty(0), SHAPES["all"])
    for gradient in (*sums.finish()[1], *torch_sums.finish()[1]):
        assert gradient.is_contiguous()
