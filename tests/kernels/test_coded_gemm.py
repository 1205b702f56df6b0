"""The grouped GEMM that decodes in its load path, against float64 row by row; weights are decoded
here by index arithmetic, one element at a time."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megalora_kernels import CodedWeight, QuantisedWeight, Routing, Scratch, grouped_lora
from megalora_kernels import coded_gemm as coded
from megalora_kernels.quantised_weight import NF4

from tests.kernels.gemm import row_by_row
from tests.kernels.oracle import ULP

COUNTS = [7, 0, 33, 16, 1, 0]
"""Those of ``gemm.row_by_row``: ragged tiles, whole ones, experts without rows."""
SMALL = coded.CodedTile(16, 32, num_warps=4, num_stages=2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def quantised(form: Any, sizes: tuple[int, int, int], grain: tuple[int, int]) -> QuantisedWeight:
    """Every code there is, and scales that all differ."""
    E, N, K = sizes
    g = torch.Generator().manual_seed(1)
    width = K // 2 if form == "nf4" else K
    codes = torch.randint(0, 256, (E, N, width), generator=g, dtype=torch.uint8)
    if form == "fp8":
        codes[(codes & 127) == 127] = 5  # NaN
    scales = torch.rand(E, N // grain[0], K // grain[1], generator=g) + 0.5
    # Values of fp8 are up to 448.
    return QuantisedWeight(form, codes, scales / (1 if form == "nf4" else 64), grain)


def element_by_element(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
    """``[E, N, K]`` from the definition: where each element's bits and its scale lie."""
    _, N, K = weight.sizes
    p, q = weight.grain
    n, k = torch.meshgrid(torch.arange(N), torch.arange(K), indexing="ij")
    if weight.form == "nf4":
        within = k % q
        byte = weight.codes[:, n, k // q * (q // 2) + within % (q // 2)].int()
        nibble = torch.where(within < q // 2, byte % 16, byte // 16)
        value = torch.tensor(NF4)[nibble]
    else:
        value = weight.codes.view(torch.float8_e4m3fn).float()
    return (value * weight.scales[:, n // p, k // q]).to(dtype)


@dataclass(frozen=True)
class Case:
    form: str
    grain: tuple[int, int]
    n: int
    k: int
    dtype: torch.dtype = torch.float32
    ranks: tuple[int | None, ...] = (3, 5)
    gathered: bool = True
    native: bool = True

    def __str__(self) -> str:
        return f"{self.form}-{self.grain}-{self.n}x{self.k}-{self.dtype}".replace("torch.", "")


# A block of columns of 24, 40 or 80 is no multiple of the tile's 32. A shard of 96 columns has
# blocks of 32 of either form, one of 192 blocks of 64.
FAST = [
    Case("nf4", (1, 64), 48, 128, gathered=False),
    Case("nf4", (1, 32), 48, 96, torch.bfloat16, (None, 4)),
    Case("fp8", (16, 32), 48, 96, torch.bfloat16, (6,)),
]
SLOW = [
    Case("nf4", (1, 64), 160, 192, torch.bfloat16),
    Case("nf4", (1, 32), 80, 96, ranks=()),
    Case("fp8", (128, 128), 256, 256, torch.bfloat16),
    Case("fp8", (64, 64), 192, 192, native=False),
    Case("fp8", (8, 16), 40, 48, torch.bfloat16, (), native=False),
    Case("fp8", (32, 64), 96, 192, torch.float16, (None, 7), gathered=False),
]
ALL = [*FAST, *[pytest.param(case, marks=pytest.mark.slow) for case in SLOW]]


def check(case: Case, tile: coded.CodedTile | None = SMALL) -> None:
    """|error| <= (u + n 2^-24) times the sum over absolute values: one rounding of the result, n
    terms added in float32. Weights are rounded alike on both sides."""
    M = sum(COUNTS)
    E = len(COUNTS)
    tokens = 40 if case.gathered else M
    source = torch.arange(M, dtype=torch.int32) * 7 % 40 if case.gathered else None
    weight = quantised(case.form, (E, case.n, case.k), case.grain)
    x = normal(tokens, case.k).to(case.dtype)
    rank = sum(r or 0 for r in case.ranks)
    width = case.n // max(1, len(case.ranks))
    blocks = []
    for i, r in enumerate(case.ranks):
        # As [E, r, N / n] of memory that lies [E, N / n, r], as B's do.
        b = None if r is None else normal(E, width, r, seed=i).to(case.dtype).transpose(1, 2)
        blocks.append(b)
    operands = {
        "x": x, "routing": Routing(torch.tensor(COUNTS).cumsum(0).int(), M),
        "s_MR": normal(M, rank).to(case.dtype) if rank else None,
        "b": tuple(blocks) if rank else None, "source_M": source,
    }  # fmt: skip
    y = coded.coded_gemm_triton(**operands, weight=weight, tile=tile)
    w = element_by_element(weight, case.dtype).transpose(1, 2)
    expected = row_by_row(operands | {"w_EKN": w})
    absolute: dict[str, Any] = operands | {"w_EKN": w.abs(), "x": x.abs()}
    if rank:
        absolute["s_MR"] = operands["s_MR"].abs()  # pyright: ignore[reportOptionalMemberAccess]
        absolute["b"] = [None if b is None else b.abs() for b in blocks]
    allowed = 1.1 * (ULP[case.dtype] + (case.k + 16) * 2.0**-24) * row_by_row(absolute)
    assert y.dtype == case.dtype and y.isfinite().all()
    # The specification, too, which decodes first.
    for found in (y, coded.coded_gemm_ref(**operands, weight=weight)):
        assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("case", ALL, ids=str)
def test_products_with_codes(case: Case, uninitialised_is_nan, monkeypatch):
    if not case.native:
        # A GPU that does not convert float8: sm_80.
        monkeypatch.setattr(coded, "FP8_UNITS", (99, 0))
    check(case)


@pytest.mark.parametrize("case", [FAST[1]], ids=str)
def test_products_with_codes_in_the_opposite_order(case: Case, reversed_programs):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [FAST[0], FAST[2], *SLOW[:3]], ids=str)
def test_all_products_in_the_opposite_order(case: Case, reversed_programs):
    check(case)


@pytest.mark.parametrize("native", [True, False])
def test_every_fp8_code_has_its_value(native: bool, monkeypatch):
    """With the identity for x, yᵀ is W. Rows 7 and 15 have NaN, which Triton's interpreter
    converts to 480; a GPU does not."""
    monkeypatch.setattr(coded, "FP8_UNITS", (8, 9) if native else (99, 0))
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    weight = QuantisedWeight("fp8", codes, torch.tensor([[[0.375]]]), (16, 16))
    routing = Routing(torch.tensor([16], dtype=torch.int32), 16)
    y = coded.coded_gemm_triton(torch.eye(16), weight, routing, tile=SMALL).t()
    expected = weight.dequantised(torch.float32)[0]
    plain = expected.isfinite().all(1)
    assert plain.sum() == 14 and torch.equal(y[plain], expected[plain])
    if not native:
        # 0 * NaN spoils the whole row.
        assert y[~plain].isnan().all()


class TestChoice:
    @staticmethod
    def routing(rows: int) -> Routing:
        return Routing(torch.empty(4, dtype=torch.int32, device="meta"), rows)

    def test_few_rows_are_decoded_in_load_and_the_offsets_are_not_read(self, monkeypatch):
        # A tensor on meta has no numbers that could be read.
        monkeypatch.delenv(coded.ENV_IN_LOAD, raising=False)
        weight = quantised("nf4", (4, 2, 64), (1, 64))
        assert coded.in_load(weight, self.routing(4 * 256))
        assert not coded.in_load(weight, self.routing(4 * 256 + 1))

    @pytest.mark.parametrize(("rows", "taken"), [("7", True), ("6", False), ("0", False)])
    def test_the_environment_has_another_number(self, rows, taken, monkeypatch):
        monkeypatch.setenv(coded.ENV_IN_LOAD, rows)
        weight = quantised("fp8", (4, 2, 64), (1, 64))
        assert coded.in_load(weight, self.routing(28)) == taken
        assert rows != "0" or not coded.in_load(weight, self.routing(0))

    @pytest.mark.parametrize("text", ["many", "-1", "2.5"])
    def test_what_is_no_number_of_rows_is_refused(self, text, monkeypatch):
        monkeypatch.setenv(coded.ENV_IN_LOAD, text)
        with pytest.raises(ValueError, match=f"MEGALORA_IN_LOAD_ROWS is '{text}'.* unset it"):
            coded.in_load(quantised("nf4", (4, 2, 64), (1, 64)), self.routing(28))

    @pytest.mark.parametrize(
        ("form", "columns"), [("nf4", 16), ("nf4", 24), ("fp8", 8), ("fp8", 48)]
    )
    def test_blocks_that_the_kernel_cannot_read_are_decoded_first(self, form, columns):
        weight = quantised(form, (4, 2, 48), (1, columns))
        assert not coded.in_load(weight, self.routing(28))
        with pytest.raises(ValueError, match=f"{form} codes with a scale for each {columns}"):
            coded.coded_gemm_triton(torch.zeros(28, 48), weight, self.routing(28))

    def test_before_hopper_every_32_rows_decode_anew_so_that_fewer_are_taken(self, monkeypatch):
        monkeypatch.delenv(coded.ENV_IN_LOAD, raising=False)
        monkeypatch.setattr(coded, "device_limits", lambda _: (99 * 1024, (8, 9)))
        weight = quantised("nf4", (4, 2, 64), (1, 64))
        assert coded.in_load(weight, self.routing(4 * 64))
        assert not coded.in_load(weight, self.routing(4 * 64 + 1))
        assert coded.tile_for(torch.bfloat16, 64, (8, 9)).block_m == 32

    @pytest.mark.parametrize(("rows", "block_m"), [(16, 32), (17, 64), (32, 64), (33, 128)])
    def test_most_experts_are_one_tile_of_rows(self, rows, block_m):
        assert coded.tile_for(torch.bfloat16, rows).block_m == block_m


def held(weight: QuantisedWeight, rank: int) -> tuple[CodedWeight, Scratch]:
    E, N, K = weight.sizes
    scratch = Scratch()
    room = rank + -rank % 16
    scratch.reserve(E * (N + room) * (K + room), torch.float32, torch.device("cpu"))
    return CodedWeight(weight, rank, torch.float32, scratch, object()), scratch


@pytest.mark.parametrize("experts", [1, 3])
def test_a_linear_decodes_nothing_forward_and_once_backward(experts: int, monkeypatch):
    """One expert: a dense linear. Output and gradients are those of the decoded weight."""
    monkeypatch.delenv(coded.ENV_IN_LOAD, raising=False)
    M, N, K, R = 20, 40, 64, 4
    weight = quantised("nf4", (experts, N, K), (1, 64))
    stored, scratch = held(weight, R)
    offsets = torch.linspace(0, M, experts + 1).int()[1:]
    dy = normal(M, N)

    def train(w: Any) -> tuple[torch.Tensor, ...]:
        leaves = [normal(M, K), normal(experts, R, K) / 8, normal(experts, N, R)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = grouped_lora(leaves[0], w, offsets, leaves[1], leaves[2], backend="triton")
        assert scratch.filled == 0
        return y, *torch.autograd.grad(y, leaves, dy)

    found = train(stored)
    assert scratch.filled == 1
    scratch.filled = 0
    for got, want in zip(found, train(weight.dequantised(torch.float32)), strict=True):
        # Sums of at most 64 + 4 terms in another order.
        assert (got - want).abs().max() <= 2 * 68 * 2.0**-24 * want.abs().max() * 8


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_experts_decode_nothing_forward(form: str, monkeypatch):
    """gate, up and down with adapters: outputs and gradients with codes in load, decoded first and
    plain are those of one model."""
    from megalora_kernels import ExpertFactors, expert_mlp, route

    monkeypatch.delenv(coded.ENV_IN_LOAD, raising=False)
    T, E, H, I, r = 12, 3, 64, 96, 4
    grain = (1, 32) if form == "nf4" else (32, 32)
    weights = [quantised(form, sizes, grain) for sizes in ((E, 2 * I, H), (E, H, I))]
    routing, _ = route(torch.ones(T, E, dtype=torch.bool), E)
    dout = normal(T, H)

    def train(w1: Any, w2: Any) -> tuple[torch.Tensor, ...]:
        shapes = [(T, H), (E, 2 * r, H), (E, I, r), (E, I, r), (E, r, I), (E, H, r)]
        leaves = [(normal(*s) / s[-1] ** 0.5).requires_grad_() for s in shapes]
        x, a1, gate, up, a2, b2 = leaves
        adapters: dict[str, Any] = {
            "gate_up": ExpertFactors(a1, (gate, up), (0.5, 1.5)),
            "down": ExpertFactors(a2, (b2,), (2.0,)),
        }
        p = torch.linspace(0.1, 0.9, T * E)
        y = expert_mlp(x, w1, w2, p, routing, backend="triton", **adapters)
        return y, *torch.autograd.grad(y, leaves, dout)

    def with_codes() -> tuple[tuple[torch.Tensor, ...], list[int]]:
        stored = [held(w, 2 * r) for w in weights]
        found = train(*(w for w, _ in stored))
        return found, [scratch.filled for _, scratch in stored]

    in_load, filled = with_codes()
    assert filled == [1, 1]  # for backward alone
    monkeypatch.setenv(coded.ENV_IN_LOAD, "0")
    first, _ = with_codes()
    plain = train(*(w.dequantised(torch.float32) for w in weights))
    for got, decoded, want in zip(in_load, first, plain, strict=True):
        assert torch.equal(decoded, want)
        # Float32 sums of up to 192 terms through three products, in another order.
        assert (got - want).abs().max() <= 3 * 192 * 2.0**-24 * want.abs().max()
