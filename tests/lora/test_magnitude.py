"""Check DoRA's norms, magnitudes and scaling against its definition, written out in float64."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalora.config import LoRAConfig
from megalora.lora.factors import LoRAFactors
from megalora.lora.magnitude import refresh_norms, scale_rows
from megalora.lora.row_lengths import with_lengths
from megalora.model.families import layer_projections
from tests.lora.shapes import ATTENTION_NAMES, SHARED_SHAPE, adapt, refusal

ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
GROUPS: Any = SimpleNamespace(ep=ALONE, named=lambda _: ALONE, experts_reduce_separately=True)
QKV = "self_attention.linear_qkv"


def filled(module: str, names: list[str], dtype: torch.dtype = torch.float32) -> LoRAFactors:
    """A module of layer 0 on one rank with a random weight, as training starts."""
    options = {"target_modules": names, "use_dora": True, "rank_pattern": {"q_proj": 2}}
    if "q_proj" not in names:
        del options["rank_pattern"]
    adapted = []
    for a in adapt(SHARED_SHAPE, rank=3, alpha=12.0, layers=[0], **options):
        if a.projection.module == module:
            adapted.append(a)
    fused = [p for p in layer_projections(SHARED_SHAPE, 0) if p.module == module]
    factors = LoRAFactors(
        adapted, fused, SHARED_SHAPE, GROUPS,
        seed=1, dtype=dtype, device=torch.device("cpu"),
    )  # fmt: skip
    rows = sum(factors.block_rows) * factors.row_groups
    columns = adapted[0].in_features
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    factors.base_weight = lambda: weight
    refresh_norms([factors], GROUPS, start=True)
    return factors


def trained(factors: LoRAFactors) -> LoRAFactors:
    """With other factors, and the norms that they make."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (*factors.lora_B.values(), *factors.lora_M.values()):
            parameter += 0.1 * torch.rand(parameter.shape, generator=generator)
    refresh_norms([factors], GROUPS)
    return factors


def rows_of(factors: LoRAFactors) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(projection, numbers of its rows in the fused weight, its A, its scale); q, k and v take
    turns by query group, heads of 32 rows."""
    heads = {"q_proj": [0, 1, 2, 5, 6, 7], "k_proj": [3, 8], "v_proj": [4, 9]}
    start = 0
    for a in factors.adapted:
        rows = torch.arange(a.out_features)
        if a.projection.module == QKV:
            rows = torch.cat([torch.arange(32) + 32 * head for head in heads[a.name]])
        yield a.name, rows, factors.lora_A[start : start + a.rank].double(), a.scale
        start += a.rank


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (QKV, ["q_proj", "k_proj", "v_proj"]),
        # k keeps its rows, which nothing scales.
        (QKV, ["q_proj", "v_proj"]),
        ("self_attention.linear_proj", ["o_proj"]),
    ],
)
def test_norms_and_scaling_are_those_of_the_definition(module: str, names: list[str]) -> None:
    factors = trained(filled(module, names))
    weight = factors.base_weight()  # type: ignore[misc]
    gains = torch.ones(len(weight), dtype=torch.float64)
    for name, rows, a, scale in rows_of(factors):
        b: Any = factors.lora_B[name]
        m: Any = factors.lora_M[name]
        norms = (weight[rows].double() + scale * b.double() @ a).norm(dim=1)
        # Float32 rounds at 6e-8; a norm is a root of three sums.
        torch.testing.assert_close(factors.norms[name].double(), norms, rtol=2e-6, atol=0)
        gains[rows] = (m.double() / norms).detach()
    u = torch.randn(3, 2, len(weight), generator=torch.Generator().manual_seed(3))
    found = scale_rows(u, factors).double()
    torch.testing.assert_close(found, u.double() * gains, rtol=3e-6, atol=1e-6)
    assert (gains - 1).abs().max() > 0.003


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_scales_by_one_to_the_bit(dtype: torch.dtype) -> None:
    factors = filled(QKV, ["q_proj", "k_proj", "v_proj"], dtype)
    rows = len(factors.base_weight())  # type: ignore[misc]
    u = torch.randn(5, 1, rows, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(scale_rows(u, factors), u)


def test_bfloat16_keeps_a_magnitude_that_it_cannot_hold_itself() -> None:
    """1.003 is 1 in bfloat16; of many outputs some are another bfloat16 for it."""
    factors = filled(QKV, ["q_proj", "k_proj", "v_proj"], torch.bfloat16)
    with torch.no_grad():
        for m in factors.lora_M.values():
            m *= 1.003
    u = torch.linspace(1, 2, 320).bfloat16().expand(4, 1, 320).contiguous()
    assert torch.equal(scale_rows(u, factors), (u.float() * 1.003).bfloat16())


def test_gradients() -> None:
    factors = trained(filled("self_attention.linear_proj", ["o_proj"]))
    m: Any = factors.lora_M["o_proj"]
    generator = torch.Generator().manual_seed(4)
    u = torch.randn(3, 2, 96, generator=generator, requires_grad=True)
    dy = torch.randn(3, 2, 96, generator=generator)
    du, dm = torch.autograd.grad(scale_rows(u, factors), (u, m), dy)
    norms = factors.norms["o_proj"].double()
    torch.testing.assert_close(du.double(), dy * m.double() / norms, rtol=1e-6, atol=1e-6)
    wanted = (dy.double() * u.double()).sum((0, 1)) / norms
    torch.testing.assert_close(dm.double(), wanted, rtol=1e-5, atol=1e-6)
    # The norm is taken for a constant: nothing of A and B depends on it.
    assert not factors.norms["o_proj"].requires_grad


def test_a_row_of_zeros_stays_one() -> None:
    factors = filled("self_attention.linear_proj", ["o_proj"])
    factors.base_weight()[7] = 0  # type: ignore[misc]
    factors.squares = None
    refresh_norms([factors], GROUPS, start=True)
    u = torch.ones(2, 1, 96)
    u[..., 7] = 0
    assert torch.equal(scale_rows(u, factors), u)
    assert torch.equal(with_lengths(torch.zeros(2, 3), torch.zeros(2)), torch.zeros(2, 3))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        # Views of the weight are not made.
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, made.numel())
        return made


def test_neither_the_sum_nor_the_delta_is_made() -> None:
    factors = trained(filled(QKV, ["q_proj", "k_proj", "v_proj"]))
    rows, _ = factors.base_weight().shape  # type: ignore[misc]
    with Largest() as largest:
        refresh_norms([factors], GROUPS)
    # [out, R] twice the rank at most; a whole weight has 96 columns.
    assert 0 < largest.elements <= rows * factors.stacked_rank


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ([*ATTENTION_NAMES, "gate"], "mlp.gate cannot"),
        ([*ATTENTION_NAMES, "lm_head"], "lm_head cannot"),
    ],
)
def test_linears_without_dora_are_refused_by_name(targets: Any, named: str) -> None:
    message = refusal(target_modules=targets, use_dora=True)
    assert named in message and "lora.use_dora=[" in message and "\n" not in message


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora.use_dora needs lora.dropout=0, got 0.1"):
        LoRAConfig(use_dora=True, dropout=0.1)
