"""Check variants of the Triton grouped GEMM that cannot run: named, they are an error; chosen, they
give way."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.conftest import gemm_kernel
from tests.kernels.gemm import BY_TMA, SMALL, Case, K, N, row_by_row

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")


# 264,320 = two stages of (16 + 2048) x 16 values of four bytes and 128 bytes of barriers. An H100
# has 232,448 for a program.
@pytest.mark.parametrize(
    "case, variant, why",
    [
        (Case(k=40, gathered=False), BY_TMA, "K=40 is not a multiple of 16"),
        (Case(n=120, gathered=False), BY_TMA, "60 columns are not a multiple of 32"),
        (Case(), BY_TMA, "rows that are gathered cannot be read by TMA"),
        (
            Case(),
            replace(SMALL, block_m=512, block_n=64),
            "4 warps would hold 256 sums per thread, at most 128 fit",
        ),
        (
            Case(),
            replace(SMALL, block_n=2048, num_warps=8),
            "needs 264320 bytes of shared memory, the device has 232448",
        ),
    ],
    ids=["K", "N", "gathered", "registers", "shared memory"],
)
def test_a_variant_asked_for_that_cannot_run_says_why(case, variant, why):
    with pytest.raises(ValueError, match=why):
        gemm_kernel.grouped_gemm_triton(**case.operands(), variant=variant)


def test_addresses_that_tma_cannot_read():
    """Named, they are an error; chosen by a table, which cannot know addresses, pointers are
    taken."""
    o = Case(gathered=False, dtype=torch.float16).operands()
    w = o["w_EKN"].transpose(1, 2)
    # Two bytes past a multiple of 16
    shifted = torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape).transpose(1, 2)
    # Rows of 49 elements, of which the last belongs to nobody: 98 bytes from one to the next.
    wide = torch.nn.functional.pad(w, (0, 1))[:, :, :-1].transpose(1, 2)
    # N rows of K per expert and 8 elements more: no whole number of rows
    between = (
        torch.nn.functional.pad(w.flatten(1), (0, 8))
        .as_strided(w.shape, (N * K + 8, K, 1))
        .transpose(1, 2)
    )
    rows = torch.nn.functional.pad(o["x"], (0, 1))[:, :-1]
    message = "TMA needs rows that start at multiples of 16 bytes: {} has strides"
    cases = [
        ({"w_EKN": shifted}, message.format("the weight")),
        ({"w_EKN": wide}, message.format("the weight")),
        ({"x": rows}, message.format("x")),
        (
            {"x": o["x"][:1].expand(o["x"].shape)},
            "TMA needs rows that do not overlap: x has strides",
        ),
        (
            {"w_EKN": between},
            "TMA needs experts a whole number of rows apart: the weight has strides",
        ),
    ]
    for changed, why in cases:
        with pytest.raises(ValueError, match=why):
            gemm_kernel.grouped_gemm_triton(**{**o, **changed}, variant=BY_TMA)


def test_what_is_chosen_gives_way_where_addresses_forbid_it(monkeypatch):
    monkeypatch.setattr(gemm_kernel, "choose_variant", lambda *_: BY_TMA)
    o = Case(gathered=False).operands()
    padded = torch.nn.functional.pad(o["x"], (0, 1))[:, :-1]
    expanded = o["x"][:1].expand(o["x"].shape)
    for x in (padded, expanded):
        o["x"] = x
        torch.testing.assert_close(
            gemm_kernel.grouped_gemm_triton(**o).double(), row_by_row(o), rtol=1e-4, atol=1e-4
        )
