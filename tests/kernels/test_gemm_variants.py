"""Every kind of variant of the Triton grouped GEMM gives the same numbers, in the interpreter:
against float64, row by row."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from megalora_kernels import AugmentedWeight, Routing
from megalora_kernels.variants import Variant
from triton.runtime import interpreter as triton_interpreter

from tests.kernels import interpreter
from tests.kernels.conftest import gemm_kernel, grouped_gemm
from tests.kernels.oracle import ULP, expert_of_rows

pytestmark = pytest.mark.usefixtures("uninitialised_is_nan")

COUNTS = [7, 0, 33, 16, 1, 0]
"""Fewer rows than a tile, none, two tiles and a row, exactly a tile, one row, none."""
K = 48
N = 128
TOKENS = 40
SMALL = Variant(16, 32, 16, num_warps=4, num_stages=2)
BY_TMA = replace(SMALL, weight="tma", rows="tma")
KINDS = {
    "pointers": SMALL,
    "weight by tma": replace(SMALL, weight="tma"),
    "both by tma": BY_TMA,
    "pointers, persistent": replace(SMALL, persistent=True),
    "weight by tma, persistent": replace(SMALL, weight="tma", persistent=True),
    "both by tma, persistent": replace(BY_TMA, persistent=True),
}
RANKS: dict[str, tuple[int | None, ...]] = {
    "no adapter": (),
    "one block": (5,),
    "gate and up": (3, 5),
    "equal ranks": (16, 16),
    "gate alone": (3, None),
    "up alone": (None, 5),
}
Operands = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Sizes and form of a product."""

    ranks: tuple[int | None, ...] = (3, 5)
    op: str = "forward"
    gathered: bool = True
    joined: bool = False
    dtype: torch.dtype = torch.float32
    k: int = K
    n: int = N

    def operands(self) -> Operands:
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)

        E = len(COUNTS)
        M = sum(COUNTS)
        # Each block of B fills its share of the columns: gate's the first half, up's the second.
        width = self.n // max(1, len(self.ranks))
        source = None
        if self.gathered:
            source = torch.randint(0, TOKENS, (M,), generator=g, dtype=torch.int32)
        b: list[torch.Tensor | None] = []
        stacked_rank = 0
        for rank in self.ranks:
            if rank is None:
                b.append(None)
                continue
            stacked_rank += rank
            block = normal(E, rank, width)
            if self.op == "forward":
                # the same values in memory as [E, N, r], as B is kept
                block = block.transpose(1, 2).contiguous().transpose(1, 2)
            b.append(block)
        return {
            "x": normal(TOKENS if self.gathered else M, self.k),
            "w_EKN": self.weight(normal(E, self.k, self.n)),
            "routing": Routing(torch.tensor(COUNTS).cumsum(0).int(), M),
            "s_MR": normal(M, stacked_rank) if stacked_rank else None,
            "b": tuple(b) if stacked_rank else None,
            "source_M": source,
        }

    def weight(self, w_EKN: torch.Tensor) -> torch.Tensor:
        """The same values stored [E, N, K] or [E, K, N], perhaps within the wider buffer of a
        ``AugmentedWeight``."""
        stored = w_EKN.transpose(1, 2).contiguous() if self.op == "forward" else w_EKN
        if self.joined:
            joined = AugmentedWeight(stored, 5)
            # what lies behind a weight's rows and columns must not be read
            joined.buffer[:, joined.N :] = torch.nan
            joined.buffer[:, :, joined.K :] = torch.nan
            stored = joined.weight
        return stored.transpose(1, 2) if self.op == "forward" else stored


def row_by_row(o: Operands) -> torch.Tensor:
    """The product in float64: one row at a time, without slicing by offsets."""
    M = o["routing"].num_rows
    N = o["w_EKN"].shape[2]
    y = torch.zeros(M, N, dtype=torch.float64)
    for m, e in enumerate(expert_of_rows(COUNTS)):
        token = m if o["source_M"] is None else int(o["source_M"][m])
        y[m] = o["x"][token].double() @ o["w_EKN"][e].double()
        column = 0
        rank = 0
        for block in o["b"] or ():
            # S has no columns for a block that is None, but the output has.
            width = N // len(o["b"])
            if block is not None:
                s = o["s_MR"][m, rank : rank + block.shape[1]].double()
                y[m, column : column + width] += s @ block[e].double()
                rank += block.shape[1]
            column += width
    return y


def assert_right(case: Case, variant: Variant | None) -> torch.Tensor:
    """|error| <= (u + n 2^-24) times the same sum over absolute values: one rounding, n terms added
    in float32."""
    o = case.operands()
    y = gemm_kernel.grouped_gemm_triton(**o, variant=variant)
    expected = row_by_row(o)
    absolute = dict(o)
    for name in ("x", "w_EKN", "s_MR"):
        if o[name] is not None:
            absolute[name] = o[name].abs()
    if o["b"] is not None:
        absolute["b"] = [block if block is None else block.abs() for block in o["b"]]
    # n: K terms of the base and at most 32 of the adapter (ranks 16 and 16).
    allowed = 1.1 * (ULP[case.dtype] + (case.k + 32) * 2.0**-24) * row_by_row(absolute)
    assert y.dtype == case.dtype and y.isfinite().all()
    assert ((y.double() - expected).abs() <= allowed).all()
    return y


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
                label = f"{name}, {op}{', joined' * joined}"
                found.append(pytest.param(variant, case, id=label))
    return found


@pytest.mark.parametrize("variant, case", forms())
def test_every_kind_in_both_program_orders(variant, case, few_programs, monkeypatch):
    y = assert_right(case, variant)
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
            total = total + a.data[:, k, None].astype(np.float32) * b.data[None, k, :].astype(
                np.float32
            )
        return triton_interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(triton_interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("op", ["forward", "dgrad"])
def test_bits_do_not_depend_on_the_variant(op, few_programs, products_term_by_term):
    """K's terms in one order, the adapter's after them: ranks may then choose variants on their
    own."""
    case = Case((16, 16) if op == "forward" else (16,), op=op, gathered=False)
    o = case.operands()
    y = gemm_kernel.grouped_gemm_triton(**o, variant=SMALL)
    others = [replace(SMALL, block_m=m, block_n=n) for m, n in ((16, 32), (64, 32), (32, 64))]
    others += [replace(kind, block_m=32, block_n=64) for kind in KINDS.values()]
    for variant in others:
        assert torch.equal(gemm_kernel.grouped_gemm_triton(**o, variant=variant), y), variant
    # Without the adapter the bits differ, so equality above says something about it.
    assert not torch.equal(y, gemm_kernel.grouped_gemm_triton(**{**o, "b": None}, variant=SMALL))


# ---- the other forms, and the reference --------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("form", ["reference", "loop"])
def test_blocks_of_b_without_triton(form, ranks):
    o = Case(ranks, dtype=torch.float64).operands()
    compute = {"reference": grouped_gemm.grouped_gemm_ref, "loop": grouped_gemm.grouped_gemm_loop}[
        form
    ]
    torch.testing.assert_close(compute(**o), row_by_row(o), rtol=1e-12, atol=1e-12)


def test_joined_keeps_zeros_beside_its_blocks():
    """An adapter with other ranks finds none of its predecessor's values where its own blocks are
    not."""
    w_ENK = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    joined = AugmentedWeight(w_ENK, 16)
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


# ---- variants that cannot run ------------------------------------------------------------------


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
    wide = torch.nn.functional.pad(w, (0, 1))[:, :, :-1].transpose(1, 2)  # rows of 49 elements
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
