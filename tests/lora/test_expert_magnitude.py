"""Compare DoRA on routed experts with a plain loop over experts in float64: norms, values and
gradients of A, B and magnitudes."""

from typing import Any

import pytest
import torch
from megalora_kernels import Routing, expert_mlp, route
from torch import Tensor

from megalora.config import LoRAConfig
from megalora.lora.experts import ExpertsLoRA
from megalora.lora.factors import LoRAFactors
from megalora.lora.magnitude import refresh_norms
from megalora.model.families import layer_projections
from tests.lora.shapes import MOE_SHAPE, adapt, refusal
from tests.lora.test_magnitude import GROUPS, Largest

NAMES = ["gate_proj", "up_proj", "down_proj"]
E = MOE_SHAPE.num_experts
H = MOE_SHAPE.hidden
INNER = MOE_SHAPE.expert_intermediate
TOKENS = 23


class Frozen(torch.nn.Module):
    """Experts as ``FusedExperts`` holds them, without Megatron."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.gate_up = torch.randn(E, 2 * INNER, H, generator=generator) / H**0.5
        self.down = torch.randn(E, H, INNER, generator=generator) / INNER**0.5

    def check_room(self, name: str, rank: int) -> None:
        """Nothing is joined here."""

    def weight(self, name: str) -> Tensor:
        return getattr(self, name)

    def compute(
        self, x: Tensor, routing: Routing, probs: Tensor, gate_up: Any, down: Any, dropout: float
    ) -> Tensor:
        operands = (x, self.gate_up, self.down, probs, routing)
        return expert_mlp(*operands, gate_up=gate_up, down=down, dropout=dropout)


def experts(use_dora: Any) -> ExpertsLoRA:
    """One layer on one rank, as after some training."""
    adapted = adapt(
        MOE_SHAPE, rank=3, alpha=12.0, layers=[0], target_modules=NAMES, use_dora=use_dora,
        rank_pattern={"up_proj": 2},
    )  # fmt: skip
    base = Frozen()
    found: dict[str, LoRAFactors] = {}
    for name in ("gate_up", "down"):
        module = f"mlp.experts.{name}"
        of_module = [a for a in adapted if a.projection.module == module]
        fused = [p for p in layer_projections(MOE_SHAPE, 0) if p.module == module]
        found[name] = LoRAFactors(
            of_module, fused, MOE_SHAPE, GROUPS,
            seed=1, dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
    layer = ExpertsLoRA(base, found["gate_up"], found["down"], dropout=0.0)
    refresh_norms([layer], GROUPS, start=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for factors in found.values():
            for parameter in (*factors.lora_B.values(), *factors.lora_M.values()):
                parameter += 0.1 * torch.rand(parameter.shape, generator=generator)
    refresh_norms([layer], GROUPS)
    return layer


def leaves_of(layer: ExpertsLoRA) -> dict[str, Tensor]:
    """Every trained parameter by name."""
    return dict(layer.named_parameters())


def by_a_loop(layer: ExpertsLoRA, leaves: dict[str, Tensor], x: Tensor, p_TE: Tensor) -> Tensor:
    """[T, H] in float64: each expert's three weights as ``m (W + s B A) / |W + s B A|``, whose norm
    is a constant, and no grouped product."""
    out = torch.zeros(TOKENS, H, dtype=torch.float64)
    for e in range(E):
        weights = {
            "gate_proj": layer.base.gate_up[e, :INNER].double(),
            "up_proj": layer.base.gate_up[e, INNER:].double(),
            "down_proj": layer.base.down[e].double(),
        }
        for part, factors in (("gate_up", layer.gate_up), ("down", layer.down)):
            assert factors is not None
            start = 0
            for a in factors.adapted:
                a_rI = leaves[f"{part}.lora_A"][e, start : start + a.rank]
                b_Or = leaves[f"{part}.lora_B.{a.name}"][e]
                start += a.rank
                whole = weights[a.name] + a.scale * b_Or @ a_rI
                m_EO = leaves.get(f"{part}.lora_M.{a.name}")
                if m_EO is not None:
                    whole = whole * (m_EO[e] / whole.detach().norm(dim=1))[:, None]
                weights[a.name] = whole
        gate = torch.nn.functional.silu(x @ weights["gate_proj"].T)
        h = gate * (x @ weights["up_proj"].T)
        out = out + p_TE[:, e : e + 1] * (h @ weights["down_proj"].T)
    return out


@pytest.mark.parametrize("use_dora", [True, ["up_proj"], ["down_proj"]], ids=str)
def test_values_and_gradients_are_a_loop_s(use_dora: Any) -> None:
    layer = experts(use_dora)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, H, generator=generator, requires_grad=True)
    dout = torch.randn(TOKENS, H, generator=generator)
    # Expert 2 gets no token.
    chosen = torch.tensor([[t % 2, 3 + t % 2] for t in range(TOKENS)])
    map_TE = torch.zeros(TOKENS, E, dtype=torch.bool).scatter_(1, chosen, True)
    p_TE = torch.rand(TOKENS, E, generator=generator) * map_TE
    routing, _ = route(map_TE, 2)
    assert routing.source_M is not None
    expert_M = torch.repeat_interleave(torch.arange(E), torch.tensor(routing.counts))
    out, _ = layer(x, routing, p_TE[routing.source_M.long(), expert_M])
    leaves = leaves_of(layer)
    grads = torch.autograd.grad(out, [x, *leaves.values()], dout)

    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    wide_x = x.detach().double().requires_grad_()
    expected = by_a_loop(layer, wide, wide_x, p_TE.double())
    wanted = torch.autograd.grad(expected, [wide_x, *wide.values()], dout.double())
    assert sum("lora_M" in name for name in leaves) == (3 if use_dora is True else 1)
    for name, found, want in zip(["x", *leaves], grads, wanted, strict=True):
        # Float32 adds 96 products at 6e-8 each, a few times over.
        assert (found - want).abs().max() <= 1e-5 * want.abs().max(), name
        assert want.any(), name
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_neither_the_sum_nor_the_delta_is_made() -> None:
    layer = experts(True)
    assert layer.gate_up is not None and layer.down is not None
    with Largest() as largest:
        refresh_norms([layer], GROUPS)
    # [E, out, R] of both B and A W, and nothing of the weight's own size [E, out, in].
    assert 0 < largest.elements <= E * 2 * INNER * layer.gate_up.stacked_rank
    # As few rows as experts, so that weights are the largest there is.
    routing = Routing(torch.arange(1, E + 1).int(), E)
    with Largest() as largest:
        out, _ = layer(torch.randn(E, H, requires_grad=True), routing, torch.ones(E))
        out.sum().backward()
    assert 0 < largest.elements < E * INNER * H


def test_a_fresh_adapter_changes_no_bit() -> None:
    layer = experts(True)
    routing = Routing(torch.arange(1, E + 1).int(), E)
    x = torch.randn(E, H, generator=torch.Generator().manual_seed(4))
    base = layer.base.compute(x, routing, torch.ones(E), None, None, 0.0)
    for factors in (layer.gate_up, layer.down):
        assert factors is not None
        factors.reset_parameters()
    refresh_norms([layer], GROUPS, start=True)
    with torch.no_grad():
        assert torch.equal(layer(x, routing, torch.ones(E))[0], base)


def test_what_experts_share_has_no_dora() -> None:
    said = refusal(target_modules=NAMES, use_dora=True, share_outer=True)
    assert "lora.share_outer: gate_proj of routed experts has DoRA" in said
    # Where the experts have none, both go together.
    both = adapt(use_dora=["q_proj"], share_outer=True)
    assert any(a.shared for a in both) and any("M" in a.factors for a in both)


def test_entries_that_mean_nothing_are_refused() -> None:
    assert "lora.use_dora: 'q_porj' matches nothing" in refusal(use_dora=["q_porj"])
    said = refusal(target_modules=["q_proj"], use_dora=["down_proj"])
    assert "lora.use_dora: 'down_proj' is not adapted; add it to lora.target_modules" in said
    said = refusal(target_modules=["q_proj", "up_proj"], use_dora=["q_proj", "down_proj"])
    assert "lora.use_dora: 'down_proj' is not adapted" in said
    with pytest.raises(ValueError, match=r"lora.use_dora=\[\] names nothing"):
        LoRAConfig(use_dora=[])
    with pytest.raises(ValueError, match=r"lora.use_dora needs lora.dropout=0, got 0.1"):
        LoRAConfig(use_dora=["q_proj"], dropout=0.1)
