"""Check the table of adaptable linears: names, sizes, parameters as in stock PEFT, and splits whose
shards make up the whole adapter and its gradients."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.lora.spec import SHARDINGS, tensor_name
from megalora.model.fields import model_shape
from megalora.model.projections import ATTENTION, DENSE_MLP, HEAD, MOE, SHARED_EXPERT, Projection
from megalora.model.shape import ModelShape
from tests.lora.shapes import (
    ATTENTION_NAMES,
    DENSE_SHAPE,
    MIXED_SHAPE,
    MLP_NAMES,
    MOE_SHAPE,
    SHARED_SHAPE,
    adapt,
)

SIZES = {
    # (out, in), by hand from MOE_SHAPE: q has 6 heads of 32, k and v have 2.
    "self_attn.q_proj": (192, 96), "self_attn.k_proj": (64, 96), "self_attn.v_proj": (64, 96),
    "self_attn.o_proj": (96, 192), "mlp.gate_proj": (144, 96), "mlp.up_proj": (144, 96),
    "mlp.down_proj": (96, 144),
    "mlp.gate": (5, 96), "gate_proj": (40, 96), "up_proj": (40, 96), "down_proj": (96, 40),
    "lm_head": (512, 96),
    "shared_expert.gate_proj": (112, 96), "shared_expert.up_proj": (112, 96),
    "shared_expert.down_proj": (96, 112),
}  # fmt: skip
# As the fused weights of a layer hold them: attention, routed experts with their router, MLP, head.
MAIN = (*ATTENTION, *MOE, *DENSE_MLP, *HEAD)
EVERY = (*MAIN, *SHARED_EXPERT)


@pytest.mark.parametrize(
    "shape",
    [MOE_SHAPE, MIXED_SHAPE, SHARED_SHAPE, DENSE_SHAPE],
    ids=["moe", "mixed", "shared", "dense"],
)
def test_names_and_sizes_of_everything(shape: ModelShape) -> None:
    every = [*ATTENTION_NAMES, *MLP_NAMES, "lm_head"]
    if shape.moe_layers:
        # A target that matches nothing is an error.
        every.append("gate")
    adapted = adapt(shape, rank=7, target_modules=every)
    expected: dict[str, tuple[int, int]] = {}
    for layer in range(4):
        stem = f"model.layers.{layer}"
        for n in ATTENTION_NAMES:
            expected[f"{stem}.self_attn.{n}"] = SIZES[f"self_attn.{n}"]
        if layer not in shape.moe_layers:
            for n in MLP_NAMES:
                expected[f"{stem}.mlp.{n}"] = SIZES[f"mlp.{n}"]
            continue
        expected[f"{stem}.mlp.gate"] = SIZES["mlp.gate"]
        for n in MLP_NAMES:
            for e in range(5):
                expected[f"{stem}.mlp.experts.{e}.{n}"] = SIZES[n]
        if shape.shared_intermediate:
            for n in MLP_NAMES:
                expected[f"{stem}.mlp.shared_expert.{n}"] = SIZES[f"shared_expert.{n}"]
    expected["lm_head"] = SIZES["lm_head"]
    found = {}
    for a in adapted:
        for module in a.hf_modules():
            found[module] = (a.out_features, a.in_features)
        # A is [rank, in], B is [out, rank].
        assert a.shape("A") == (7, a.in_features)
        assert a.shape("B") == (a.out_features, 7)
    # Dictionaries keep their order, which is the model's: layers, then the table, then experts.
    assert list(found) == list(expected)
    assert found == expected


def test_tensor_names() -> None:
    (head,) = adapt(target_modules=["lm_head"])
    down = adapt(target_modules=["down_proj"], layers=[3])[0]
    assert (head.layer, head.num_experts, head.hf_modules()) == (None, 0, ["lm_head"])
    assert down.hf_module("*") == "model.layers.3.mlp.experts.*.down_proj"  # type: ignore[arg-type]
    assert (
        tensor_name(down.hf_module(4), "B")
        == "base_model.model.model.layers.3.mlp.experts.4.down_proj.lora_B.weight"
    )
    assert tensor_name("lm_head", "A") == "base_model.model.lm_head.lora_A.weight"


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 12 / 9), (True, 12 / 3)])
def test_scale(use_rslora: bool, scale: float) -> None:
    adapted = adapt(rank=4, alpha=12.0, use_rslora=use_rslora, rank_pattern={"v_proj": 9})
    # alpha / r, and alpha / sqrt(r) for rsLoRA: ranks are squares, so that roots are whole numbers.
    others = 12 / 2 if use_rslora else 12 / 4
    for a in adapted:
        assert a.scale == (scale if a.name == "v_proj" else others)


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        ({"rank": 7, "target_modules": ["q_proj"]}, {}),
        ({"rank": 7, "target_modules": ["k_proj", "o_proj", "v_proj", "lm_head"]}, {}),
        # q: rank 5 in two of four layers and 2 in the others; o: 3 in all.
        (
            {"rank": 2, "target_modules": ATTENTION_NAMES},
            {"rank_pattern": {r"layers\.[02]\..*q_proj": 5, "o_proj": 3}},
        ),
    ],
)
def test_num_parameters_of_attention(
    tiny: Path, options: dict[str, Any], patterns: dict[str, Any]
) -> None:
    assert_trains_what_stock_peft_trains(tiny, options, patterns)


def test_num_parameters_of_a_regular_expression(tiny_dense: Path) -> None:
    # Dense, because on a MoE model PEFT 0.21 reduces an expression to its last names, and so adapts
    # every layer.
    assert_trains_what_stock_peft_trains(
        tiny_dense, {"rank": 3, "target_modules": r".*\.[13]\..*\.(k|down)_proj"}, {}
    )


def assert_trains_what_stock_peft_trains(
    base: Path, options: dict[str, Any], patterns: dict[str, Any]
) -> None:
    # Parameters are counted, so that none needs memory.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        stock = get_peft_model(
            model,
            LoraConfig(r=options["rank"], target_modules=options["target_modules"], **patterns),
        )
    adapted = resolve(LoRAConfig(**options, **patterns), model_shape(read_hf_config(base)))
    total = sum(a.num_parameters() for a in adapted)
    assert total == stock.get_nb_trainable_parameters()[0]


def test_num_parameters_of_experts() -> None:
    """Counted by hand: stock PEFT 0.21 stacks gate and up of experts, with one rank for both."""
    s = MIXED_SHAPE
    adapted = adapt(
        s,
        target_modules=["gate", *MLP_NAMES],
        rank_pattern={"gate_proj": 2, "up_proj": 3, "down_proj": 7},
    )
    # A has rank * in parameters and B out * rank: rank * (in + out), which gate, up and down share.
    experts = s.num_experts * (2 + 3 + 7) * (s.hidden + s.expert_intermediate)
    dense = (2 + 3 + 7) * (s.hidden + s.intermediate)
    # The router has the default rank of 16.
    router = 16 * (s.hidden + s.num_experts)
    found = dict.fromkeys(range(4), 0)
    for a in adapted:
        assert a.layer is not None
        found[a.layer] += a.num_parameters()
    # Layer 1 is dense.
    assert found == dict.fromkeys((0, 2, 3), experts + router) | {1: dense}


def test_fused_weights_hold_their_projections_in_the_order_of_megatron() -> None:
    """Rows of a fused weight are found by counting: another order would adapt k with v's rows."""
    modules: dict[str, list[str]] = {}
    for p in MAIN:
        modules.setdefault(p.module, []).append(p.name)
    assert modules == {
        "self_attention.linear_qkv": ["q_proj", "k_proj", "v_proj"],
        "self_attention.linear_proj": ["o_proj"],
        "mlp.router": ["gate"], "mlp.experts.gate_up": ["gate_proj", "up_proj"],
        "mlp.experts.down": ["down_proj"],
        "mlp.linear_fc1": ["gate_proj", "up_proj"], "mlp.linear_fc2": ["down_proj"],
        "output_layer": ["lm_head"],
    }  # fmt: skip
    for p in MAIN:
        # Megatron interleaves q, k and v by query group, of which there are as many as key/value
        # heads: [q q q k v | q q q k v]. All else is one block on a rank.
        interleaved = p.module == "self_attention.linear_qkv"
        assert p.row_groups(MOE_SHAPE) == (2 if interleaved else 1), p.name


def test_groups_of_the_table() -> None:
    """Experts, and they alone, are split over the group of expert tensor parallelism."""
    for p in EVERY:
        over_etp = SHARDINGS[p.kind].group == "etp"
        assert over_etp == p.is_expert == (p.kind in ("expert_column", "expert_row")), p.name
    # No row of the table is without a projection, which would leave it untested.
    assert {p.kind for p in EVERY} == set(SHARDINGS)


@pytest.mark.parametrize("ranks", [2, 4])
# The part of its name behind the number of the layer: mlp.experts.{expert}.up_proj.
@pytest.mark.parametrize("projection", EVERY, ids=lambda p: p.hf.split("}.", 1)[-1])
def test_shards_make_up_the_whole_adapter_and_its_gradients(
    projection: Projection, ranks: int
) -> None:
    """Each rank computes ``B_i A_i x_i`` with its shards; split outputs are joined, partial ones
    added.

    The gradient of a split factor is then its shard of the whole gradient, that of a replicated one
    the sum over ranks: the two cases the table stands for. The router splits nothing but the
    tokens.
    """
    # Every size that is split is a multiple of 4 ranks, key/value heads among them.
    shape = replace(MOE_SHAPE, num_kv_heads=4, num_heads=12, shared_intermediate=112)
    sharding = SHARDINGS[projection.kind]
    out, into = projection.features(shape)
    # Of the adapter, not a process. The router gets 8 tokens in 2 or 4 parts.
    rank = 3
    tokens = 8
    generator = torch.Generator().manual_seed(ranks)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    a = normal(rank, into)
    b = normal(out, rank)
    x = normal(tokens, into)
    dy = normal(tokens, out)
    # The dimension of x [tokens, in] and of dy [tokens, out] in which ranks differ, if any.
    x_dim = 1 if sharding.split_a == 1 else None
    y_dim = 1 if sharding.split_b == 0 else None
    if projection.kind == "router":
        # Sequence parallelism: every rank routes its own tokens, with the whole router.
        x_dim = 0
        y_dim = 0
    a_shards = shards(a, sharding.split_a, ranks)
    b_shards = shards(b, sharding.split_b, ranks)
    xs = shards(x, x_dim, ranks)
    dys = shards(dy, y_dim, ranks)
    outputs = []
    a_gradients = []
    b_gradients = []
    for own in zip(a_shards, b_shards, xs, dys, strict=True):
        y, a_gradient, b_gradient = gradients(*own)
        outputs.append(y)
        a_gradients.append(a_gradient)
        b_gradients.append(b_gradient)
    whole_y, whole_a_gradient, whole_b_gradient = gradients(a, b, x, dy)
    torch.testing.assert_close(joined(outputs, y_dim), whole_y)
    torch.testing.assert_close(joined(a_gradients, sharding.split_a), whole_a_gradient)
    torch.testing.assert_close(joined(b_gradients, sharding.split_b), whole_b_gradient)


def joined(parts: list[Tensor], dim: int | None) -> Tensor:
    """The whole of what ranks hold: shards side by side, or the sum of partial sums."""
    return torch.stack(parts).sum(0) if dim is None else torch.cat(parts, dim)


def shards(whole: Tensor, dim: int | None, ranks: int) -> list[Tensor]:
    """What each rank holds: a shard along ``dim``, or all of it where that is None."""
    return [whole] * ranks if dim is None else list(whole.tensor_split(ranks, dim))


def gradients(a: Tensor, b: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y = x A^T B^T, dA, dB."""
    a = a.clone().requires_grad_()
    b = b.clone().requires_grad_()
    y = x @ a.T @ b.T
    y.backward(dy)
    assert a.grad is not None and b.grad is not None
    return y.detach(), a.grad, b.grad


def test_scale_of_rslora_is_over_the_square_root() -> None:
    # 2 and 5 are no squares, and float64 rounds their roots; 1 cannot tell the two rules apart.
    for rank in (1, 2, 5, 16):
        (adapted,) = adapt(rank=rank, alpha=3.0, use_rslora=True, target_modules=["lm_head"])
        assert adapted.scale == pytest.approx(3.0 / math.sqrt(rank), rel=1e-15)
