"""Check that every kind of variant of the Triton grouped GEMM gives the same numbers, in the
interpreter: against float64, row by row."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from megalora_kernels import AugmentedWeight, Routing
from triton.runtime import interpreter as triton_interpreter

from tests.kernels import interpreter
from tests.kernels.conftest import gemm_kernel, grouped_gemm
from tests.kernels.gemm import BY_TMA, SMALL, Case, N, assert_right, row_by_row

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")

# How weight and rows are read, and whether programs walk from tile to tile. Rows by TMA beside a
# weight by pointers are never offered.
KINDS = {
    "pointers": SMALL,
    "weight by tma": replace(SMALL, weight="tma"),
    "both by tma": BY_TMA,
    "pointers, persistent": replace(SMALL, persistent=True),
    "weight by tma, persistent": replace(SMALL, weight="tma", persistent=True),
    "both by tma, persistent": replace(BY_TMA, persistent=True),
}
# Ranks of B's blocks; None: a projection without an adapter, whose columns get the base alone.
RANKS: dict[str, tuple[int | None, ...]] = {
    "no adapter": (),
    "one block": (5,),
    "gate and up": (3, 5),
    "equal ranks": (16, 16),
    "gate alone": (3, None),
    "up alone": (None, 5),
}


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs walk over some two dozen tiles, four tiles of rows at a time and then the last
    two."""
    monkeypatch.setattr(gemm_kernel, "num_multiprocessors", lambda _: 3)
    monkeypatch.setattr(gemm_kernel, "GROUP_TILES", 4)


def forms() -> list[Any]:
    """Kind and form of weight, with rows gathered where the kind can."""
    found = []
    for name, variant in KINDS.items():
        for op in ("forward", "dgrad"):
            for joined in (False, True):
                # TMA copies rectangles: it cannot gather rows.
                case = Case(op=op, joined=joined, gathered=variant.rows == "pointers")
                label = f"{name}, {op}"
                if joined:
                    label += ", joined"
                found.append(pytest.param(variant, case, id=label))
    return found


@pytest.mark.parametrize("variant, case", forms())
def test_every_kind_in_both_program_orders(variant, case, few_programs, monkeypatch):
    y = assert_right(case, variant)
    # A tile that two programs write, or one that reads what another wrote, would now differ.
    interpreter.reverse_programs(monkeypatch)
    assert torch.equal(assert_right(case, variant), y)


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize(
    "variant", [SMALL, replace(BY_TMA, persistent=True)], ids=["pointers", "tma, persistent"]
)
def test_blocks_of_b(variant, ranks, few_programs):
    assert_right(Case(ranks, gathered=False, op="forward"), variant)
    if len(ranks) < 2:
        assert_right(Case(ranks, gathered=False, op="dgrad"), variant)


@pytest.mark.parametrize("kind", ["pointers", "weight by tma", "both by tma, persistent"])
def test_half_precision(kind, few_programs):
    variant = KINDS[kind]
    assert_right(Case(dtype=torch.float16, gathered=variant.rows == "pointers"), variant)


@pytest.mark.parametrize(
    "op, k, n", [("forward", 40, 120), ("dgrad", 40, 120), ("dgrad", 7, 10)], ids=str
)
@pytest.mark.parametrize("kind", ["pointers", "pointers, persistent"])
def test_sizes_that_tiles_do_not_divide(kind, op, k, n, few_programs):
    """Of 120 columns in two blocks the last tiles of both are cut off."""
    # Case() has two blocks of gathered rows, the second case one block of rows in order.
    assert_right(Case(op=op, k=k, n=n), KINDS[kind])
    assert_right(Case((5,), op=op, k=k, n=n, gathered=False), KINDS[kind])


@pytest.mark.parametrize("tile", [(16, 64), (32, 32), (64, 128), (128, 64)], ids=str)
def test_tiles_of_other_shapes(tile, few_programs):
    """More rows than any expert has, and more columns than a block."""
    assert_right(Case(), replace(SMALL, block_m=tile[0], block_n=tile[1]))


@pytest.mark.parametrize("kind", ["pointers", "both by tma, persistent"])
def test_no_rows_at_all(kind):
    o = Case(gathered=False).operands()
    o |= {
        "x": o["x"][:0],
        "s_MR": o["s_MR"][:0],
        "routing": Routing(torch.zeros(6, dtype=torch.int32), 0),
    }
    assert gemm_kernel.grouped_gemm_triton(**o, variant=KINDS[kind]).shape == (0, N)


@pytest.fixture
def products_term_by_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tl.dot`` adds one term of K after the other, as a BLAS whose order depends on the tile's
    shape would not."""

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = d.data.astype(np.float32)
        for k in range(a.data.shape[1]):
            column = a.data[:, k, None].astype(np.float32)
            row = b.data[None, k, :].astype(np.float32)
            total = total + column * row
        return triton_interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(triton_interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("op", ["forward", "dgrad"])
def test_bits_do_not_depend_on_the_variant(op, few_programs, products_term_by_term):
    """K's terms in one order, the adapter's after them: ranks may then choose variants on their
    own."""
    case = Case((16, 16) if op == "forward" else (16,), op=op, gathered=False)
    o = case.operands()
    y = gemm_kernel.grouped_gemm_triton(**o, variant=SMALL)
    others = []
    for block_m, block_n in ((16, 32), (64, 32), (32, 64)):
        others.append(replace(SMALL, block_m=block_m, block_n=block_n))
    for kind in KINDS.values():
        others.append(replace(kind, block_m=32, block_n=64))
    for variant in others:
        assert torch.equal(gemm_kernel.grouped_gemm_triton(**o, variant=variant), y), variant
    # Without the adapter the bits differ, so equality above says something about it.
    assert not torch.equal(y, gemm_kernel.grouped_gemm_triton(**{**o, "b": None}, variant=SMALL))


# ---- the other forms, and the reference --------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("form", ["reference", "loop"])
def test_blocks_of_b_without_triton(form, ranks):
    o = Case(ranks, dtype=torch.float64).operands()
    forms = {"reference": grouped_gemm.grouped_gemm_ref, "loop": grouped_gemm.grouped_gemm_loop}
    compute = forms[form]
    torch.testing.assert_close(compute(**o), row_by_row(o), rtol=1e-12, atol=1e-12)


def test_joined_keeps_zeros_beside_its_blocks():
    """An adapter with other ranks finds none of its predecessor's values where its own blocks are
    not."""
    w_ENK = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    joined = AugmentedWeight(w_ENK, 16)
    # 8 columns of the output: two blocks of four, or one. The first adapter comes again at the end
    # but for one.
    for ranks in ((3, 5), (5, 3), (None, 5), (3, 5), (4,)):
        width = 8 // len(ranks)
        b = []
        for r in ranks:
            # Each block is filled with its own rank, so that a leftover can be told.
            b.append(None if r is None else torch.full((2, r, width), float(r)))
        wb_EKN = joined.with_b(tuple(b))
        want = torch.zeros(2, 16, 8)
        rank = 0
        for i, block in enumerate(b):
            if block is not None:
                columns = slice(i * width, (i + 1) * width)
                want[:, rank : rank + block.shape[1], columns] = block
                rank += block.shape[1]
        assert torch.equal(wb_EKN[:, 3:], want)
        assert torch.equal(wb_EKN[:, :3].transpose(1, 2), w_ENK)
