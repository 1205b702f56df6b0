"""Compare every kind of variant of the Triton grouped GEMM on a CUDA device with float64. Compiles
some twenty kernels.

    PYTHONPATH=kernels:. python -m pytest --noconftest -p no:cacheprovider \\
        tests/gpu/test_gemm_variants_on_gpu.py
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megalora_kernels import AugmentedWeight, Routing
from megalora_kernels.gemm_kernel import grouped_gemm_triton, product_of
from megalora_kernels.grouped_gemm import grouped_gemm_ref
from megalora_kernels.variants import Variant, candidates, device_limits

from tests.gpu.kernel_problem import DEVICE
from tests.gpu.marks import NEEDS_CUDA

pytestmark = NEEDS_CUDA
# Rows per expert: none (last, and twice in a row), one, a whole tile of 64 or 128 rows, a row more
# than a tile, and several tiles.
COUNTS = [300, 0, 129, 1, 64, 128, 0, 255, 77, 0, 0, 33, 2, 190, 127, 0]
K = 256
N = 512
TOKENS = 400
HALF_ULP = 2.0**-8
"""Largest relative error of one rounding to bfloat16, which keeps 8 bits."""


@dataclass(frozen=True)
class Form:
    """Form of a product: how weight, rows and b come."""

    op: str
    gathered: bool
    ranks: tuple[int, ...]

    def operands(self) -> dict[str, Any]:
        g = torch.Generator(DEVICE).manual_seed(0)
        E = len(COUNTS)
        M = sum(COUNTS)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, device=DEVICE).bfloat16()

        # Each block of B fills its share of the columns.
        width = N // len(self.ranks)
        if self.op == "forward":
            # Stored as nn.Linear stores them, [out, in]; read as [in, out].
            w_EKN = AugmentedWeight(normal(E, N, K), sum(self.ranks)).weight.transpose(1, 2)
            b = [normal(E, width, rank).transpose(1, 2) for rank in self.ranks]
        else:
            w_EKN = AugmentedWeight(normal(E, K, N), sum(self.ranks)).weight
            b = [normal(E, rank, width) for rank in self.ranks]
        source = torch.randint(TOKENS, (M,), generator=g, device=DEVICE, dtype=torch.int32)
        return {
            "x": normal(TOKENS if self.gathered else M, K),
            "w_EKN": w_EKN,
            "routing": Routing(torch.tensor(COUNTS).cumsum(0).int().to(DEVICE), M),
            "s_MR": normal(M, sum(self.ranks)),
            "b": tuple(b),
            "source_M": source if self.gathered else None,
        }


def in_float64(o: dict[str, Any], absolute: bool = False) -> torch.Tensor:
    """The reference in float64; with ``absolute``, of absolute values: the size of what rounds."""

    def wide(t: torch.Tensor) -> torch.Tensor:
        return t.double().abs() if absolute else t.double()

    wider = dict(o)
    for name in ("x", "w_EKN", "s_MR"):
        wider[name] = wide(o[name])
    wider["b"] = tuple(wide(block) for block in o["b"])
    return grouped_gemm_ref(**wider)


def kinds(found: list[Variant]) -> list[Variant]:
    """Of each kind the widest tile and the smallest; only the widest is offered as persistent."""
    # The same pipeline depth, so that the way operands are read is all that differs.
    wide = []
    small = []
    for v in found:
        tile = (v.block_m, v.block_n, v.num_stages)
        if tile == (128, 256, 4):
            wide.append(v)
        elif tile == (64, 128, 4):
            small.append(v)
    return wide + small


# Gathered rows exclude reading rows by TMA; a transposed weight is another descriptor.
@pytest.mark.parametrize(
    "form",
    [Form("forward", True, (16, 16)), Form("forward", False, (16,)), Form("dgrad", False, (32,))],
    ids=["gate_up", "down", "dgrad"],
)
def test_every_kind_agrees_with_float64_and_with_the_others_to_the_bit(form: Form) -> None:
    """One rounding to bfloat16, and sums of K + 32 terms in float32. No element is left as it was
    allocated."""
    o = form.operands()
    want = in_float64(o)
    size = in_float64(o, absolute=True)
    product = product_of(o["x"], o["w_EKN"], o["routing"], o["s_MR"], o["b"], o["source_M"])
    chosen = kinds(candidates(product, *device_limits(o["x"].device)))
    assert chosen
    ys = []
    # With this setting torch fills what it allocates with NaN: an element that no program wrote
    # would show.
    torch.use_deterministic_algorithms(True)
    try:
        for variant in chosen:
            ys.append(grouped_gemm_triton(**o, variant=variant))
            assert torch.equal(grouped_gemm_triton(**o, variant=variant), ys[-1]), (
                f"{variant}: other bits again"
            )
    finally:
        torch.use_deterministic_algorithms(False)
    differing = []
    for variant, y in zip(chosen, ys, strict=True):
        # float32 sums of K + 32 terms err by 2^-24 each; 1.1 covers products of both errors.
        excess = (y.double() - want).abs() - 1.1 * (HALF_ULP + (K + 32) * 2.0**-24) * size
        assert y.isfinite().all() and excess.max() <= 0, (
            f"{variant} exceeds the bound by {excess.max():.3g}"
        )
        # A rank that chose another variant would otherwise train another adapter.
        if not torch.equal(y, ys[0]):
            differing.append(variant)
    assert not differing, f"not the bits of {chosen[0]}: {differing}"
