"""Compare the vLLM plug-in's arithmetic with plain loops, where no vLLM is needed;
``test_server.py`` runs it inside vLLM."""

import pytest
import torch
from torch import Tensor

from megalora.serve.vllm_cpu.vllm_cpu_moe_lora import check_version
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.base_tokens import leaving_out_base_tokens
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.coverage import unused_modules
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.experts import Factors, apply_experts

# Tokens, hidden, expert intermediate, experts, experts of a token, slots for adapters, rank: nearly
# all different, so that tensors of exchanged dimensions would not fit.
T = 11
H = 7
I = 5
E = 6
K = 3
S = 3
R = 2


@pytest.fixture
def layer() -> dict[str, Tensor]:
    """A layer's weights, tokens and adapters. Expert 4 gets no token; slot 1 of three is nobody's,
    and -1 stands for no adapter."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # K different experts of 0 to 4 for each token; then 5 stands for 4, which gets none.
    choices = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
    # gate's rows stand above up's, as in transformers; a slot's factors have the scale in B.
    return {
        "x": draw(T, H), "gate_up": draw(E, 2 * I, H), "down": draw(E, H, I),
        "probs": draw(T, K).abs(),
        "experts": torch.where(choices == 4, 5, choices),
        "slots": torch.tensor([-1, 0, 0, 2, -1, 2, 2, 0, -1, 0, 2]),
        "gate_a": draw(S, E, R, H), "gate_b": draw(S, E, I, R), "up_a": draw(S, E, R, H),
        "up_b": draw(S, E, I, R),
        "down_a": draw(S, E, R, I), "down_b": draw(S, E, H, R),
    }  # fmt: skip


def plain(w: dict[str, Tensor]) -> Tensor:
    """Token by token, choice by choice; every weight merged before it is used."""
    out = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            e = int(w["experts"][t, k])
            s = int(w["slots"][t])
            gate = w["gate_up"][e, :I]
            up = w["gate_up"][e, I:]
            down = w["down"][e]
            if s >= 0:
                gate = gate + w["gate_b"][s, e] @ w["gate_a"][s, e]
                up = up + w["up_b"][s, e] @ w["up_a"][s, e]
                down = down + w["down_b"][s, e] @ w["down_a"][s, e]
            h = gate @ w["x"][t]
            out[t] += w["probs"][t, k] * (down @ (h * torch.sigmoid(h) * (up @ w["x"][t])))
    return out


def run(w: dict[str, Tensor], factors: Factors) -> Tensor:
    """What the plug-in computes, [T, H]."""
    return apply_experts(
        w["x"], w["gate_up"], w["down"], w["probs"], w["experts"], w["slots"], factors
    )


def two_slices(w: dict[str, Tensor]) -> Factors:
    """As vLLM keeps files with a matrix for each expert: gate and up apart."""
    return Factors(
        (w["gate_a"], w["up_a"]), (w["gate_b"], w["up_b"]), (w["down_a"],), (w["down_b"],)
    )


def test_tokens_of_two_adapters_and_of_none(layer: dict[str, Tensor]) -> None:
    # An idle expert, an unused slot and tokens of the base must not go wrong.
    assert 4 not in layer["experts"] and set(layer["slots"].tolist()) == {-1, 0, 2}
    # Sums in float32 from float64 products: 2^-24 of outputs of up to some 100.
    torch.testing.assert_close(
        run(layer, two_slices(layer)).double(), plain(layer), rtol=1e-6, atol=1e-5
    )


def test_gate_and_up_in_one_slice(layer: dict[str, Tensor]) -> None:
    """As vLLM keeps stacked files: one A for both."""
    w = layer | {"up_a": layer["gate_a"]}
    # [slots, experts, 2 I, r].
    joint = torch.cat([w["gate_b"], w["up_b"]], dim=2)
    factors = Factors((w["gate_a"],), (joint,), (w["down_a"],), (w["down_b"],))
    torch.testing.assert_close(run(w, factors).double(), plain(w), rtol=1e-6, atol=1e-5)


def test_without_adapters(layer: dict[str, Tensor]) -> None:
    w = layer | {"slots": torch.full((T,), -1)}
    torch.testing.assert_close(
        run(w, Factors((), (), (), ())).double(), plain(w), rtol=1e-6, atol=1e-5
    )


def floats_as(dtype: torch.dtype, layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layer with its numbers in another dtype; indices stay integers."""
    cast = {}
    for name, tensor in layer.items():
        cast[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return cast


def test_bfloat16(layer: dict[str, Tensor]) -> None:
    w = floats_as(torch.bfloat16, layer)
    # In float64 from the rounded numbers, so that their own rounding is no error.
    expected = plain(floats_as(torch.float64, w))
    error = (run(w, two_slices(w)).double() - expected).abs().max() / expected.abs().max()
    # Some ten roundings of 2^-9.
    assert error < 0.03


def shrink(inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, scale: float) -> None:
    """As vLLM 0.32's torch operator: slot -1 means the last."""
    output[:] = scale * torch.einsum("ni,noi->no", inputs, weights[slots])


def test_base_tokens_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, H, generator=generator)
    weights = torch.randn(S, R, H, generator=generator)
    before = torch.randn(5, R, generator=generator)
    careful = leaving_out_base_tokens(shrink)
    # Some tokens of the base, none, and all.
    for slots in ([-1, 2, 0, -1, 2], [0, 1, 2, 1, 0], [-1] * 5):
        output = before.clone()
        careful(inputs, weights, output, torch.tensor(slots), scale=2.0)
        for n, slot in enumerate(slots):
            # Rows of the base's tokens are not even written.
            expected = 2.0 * weights[slot] @ inputs[n] if slot >= 0 else before[n]
            torch.testing.assert_close(output[n], expected)

    # One slot for all rows: they belong to one request, first the base's.
    output = before.clone()
    careful(inputs, weights, output, torch.tensor([-1]), 2.0)
    torch.testing.assert_close(output, before)
    careful(inputs, weights, output, torch.tensor([1]), 2.0)
    torch.testing.assert_close(output, 2.0 * inputs @ weights[1].T)
    with pytest.raises(RuntimeError, match="5 tokens, but vLLM named adapters for 2"):
        careful(inputs, weights, output, torch.tensor([1, -1]), 2.0)


def test_only_the_version_it_was_written_for() -> None:
    check_version("0.32.0")
    check_version("0.32.1")
    # Other minor versions, and what merely begins with the same characters.
    for version in ("0.33.0", "0.3.2", "0.320.0", "1.0", "dev"):
        with pytest.raises(
            RuntimeError, match=rf"patches the internals of vLLM 0.32.x, and this is vLLM {version}"
        ):
            check_version(version)


def test_modules_that_nothing_uses() -> None:
    """vLLM would load their adapters and compute without them."""
    # By name, what vLLM has wrapped for adapters.
    wrapped = {"model.layers.0.self_attn.qkv_proj": 0, "model.layers.0.mlp.experts": 0}
    # Stacked gate and up are experts' too, under a name that no module has.
    assert unused_modules([*wrapped, "model.layers.0.mlp.experts.base_layer"], wrapped) == []
    assert unused_modules([*wrapped, "lm_head", "model.layers.0.mlp.gate"], wrapped) == [
        "lm_head",
        "model.layers.0.mlp.gate",
    ]
