"""Which linears a LoRAConfig adapts, with what settings, and what it refuses; parameter counts
against stock PEFT."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import ALIASES, resolve
from megalora.lora.spec import SHARDINGS, Adapted, tensor_name
from megalora.model.fields import model_shape
from megalora.model.projections import ATTENTION, DENSE_MLP, HEAD, MOE, SHARED_EXPERT, Projection
from megalora.model.shape import ModelShape

MOE_SHAPE = ModelShape(
    model_type="qwen3_moe", num_layers=4, hidden=96, num_heads=6, num_kv_heads=2, head_dim=32,
    intermediate=144,
    vocab=512, tied_embeddings=False, num_experts=5, top_k=3, expert_intermediate=40,
    moe_layers=frozenset(range(4)),
)  # fmt: skip
MIXED_SHAPE = replace(MOE_SHAPE, moe_layers=frozenset({0, 2, 3}))  # mlp_only_layers=[1]
SHARED_SHAPE = replace(
    MIXED_SHAPE, model_type="qwen2_moe", shared_intermediate=112, qk_norm=False, qkv_bias=True
)
DENSE_SHAPE = replace(MOE_SHAPE, model_type="qwen3", num_experts=0, top_k=0, moe_layers=frozenset())
SIZES = {  # (out, in)
    "self_attn.q_proj": (192, 96), "self_attn.k_proj": (64, 96), "self_attn.v_proj": (64, 96),
    "self_attn.o_proj": (96, 192), "mlp.gate_proj": (144, 96), "mlp.up_proj": (144, 96),
    "mlp.down_proj": (96, 144),
    "mlp.gate": (5, 96), "gate_proj": (40, 96), "up_proj": (40, 96), "down_proj": (96, 40),
    "lm_head": (512, 96),
    "shared_expert.gate_proj": (112, 96), "shared_expert.up_proj": (112, 96),
    "shared_expert.down_proj": (96, 112),
}  # fmt: skip
ATTENTION_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP_NAMES = ["gate_proj", "up_proj", "down_proj"]
EXPANSIONS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "linear_qkv": ["q_proj", "k_proj", "v_proj"],
    "linear_proj": ["o_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "linear_fc1": ["gate_proj", "up_proj"],
    "linear_fc2": ["down_proj"],
}


def adapt(shape: ModelShape = MOE_SHAPE, **options: Any) -> list[Adapted]:
    return resolve(LoRAConfig(**options), shape)


def places(adapted: list[Adapted]) -> list[tuple[int | None, str]]:
    return [(a.layer, a.name) for a in adapted]


def refusal(shape: ModelShape = MOE_SHAPE, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        adapt(shape, **options)
    return str(caught.value)


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
    assert list(found) == list(expected), (
        "order is the model's: layers, then table order, then experts"
    )
    assert found == expected
    for a in adapted:
        assert (a.shape("A"), a.shape("B")) == ((7, a.in_features), (a.out_features, 7))


@pytest.mark.parametrize(
    "shape", [MOE_SHAPE, MIXED_SHAPE, DENSE_SHAPE], ids=["moe", "mixed", "dense"]
)
def test_all_linear_leaves_out_router_and_output_layer(shape: ModelShape) -> None:
    assert places(adapt(shape)) == list(product(range(4), ATTENTION_NAMES + MLP_NAMES))


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


@pytest.mark.parametrize(("alias", "names"), EXPANSIONS.items())
def test_aliases(alias: str, names: list[str]) -> None:
    assert places(adapt(MIXED_SHAPE, target_modules=[alias])) == list(product(range(4), names))
    # In patterns and exclusions an alias means the same as among targets.
    ranks = {a.name: a.rank for a in adapt(MIXED_SHAPE, rank=3, rank_pattern={alias: 11})}
    assert ranks == {n: 11 if n in names else 3 for n in ATTENTION_NAMES + MLP_NAMES}
    left = {a.name for a in adapt(MIXED_SHAPE, exclude_modules=[alias])}
    assert left == {*ATTENTION_NAMES, *MLP_NAMES} - {*names}


def test_aliases_are_all_tested() -> None:
    assert EXPANSIONS.keys() == ALIASES.keys()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "o_proj"}, [(i, "o_proj") for i in range(4)]),
        (
            {"target_modules": "q_proj|v_proj"},
            list(product(range(4), ("q_proj", "v_proj"))),
        ),
        ({"target_modules": r"layers\.[13]\..*o_proj"}, [(1, "o_proj"), (3, "o_proj")]),
        ({"target_modules": ["gate"]}, [(0, "gate"), (2, "gate"), (3, "gate")]),
        (
            {"target_modules": [r"experts\.\d+\.down_proj"]},
            [(0, "down_proj"), (2, "down_proj"), (3, "down_proj")],
        ),
        ({"target_modules": [r"mlp\.up_proj"]}, [(1, "up_proj")]),
        (
            {"target_modules": ["v_proj", "lm_head"], "layers": [2]},
            [(2, "v_proj"), (None, "lm_head")],
        ),
        ({"exclude_modules": ["qkv_proj", r".*\.mlp\..*"]}, [(i, "o_proj") for i in range(4)]),
        ({"target_modules": ["up_proj"], "exclude_modules": [r"experts\..*"]}, [(1, "up_proj")]),
        (
            {
                "target_modules": ["k_proj"],
                "exclude_modules": [r"layers\.0\.self_attn\.k_proj"],
                "layers": "0-1",
            },
            [(1, "k_proj")],
        ),
    ],
)
def test_targets_and_exclusions(
    options: dict[str, Any], expected: list[tuple[int | None, str]]
) -> None:
    assert places(adapt(MIXED_SHAPE, **options)) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ([2], [2]),
        ([3, 0, 3], [0, 3]),
        ("1", [1]),
        ("0-2", [0, 1, 2]),
        ("2-", [2, 3]),
        ("0, 2 - 3", [0, 2, 3]),
        ("1-1,1", [1]),
    ],
)
def test_layers(layers: list[int] | str | None, expected: list[int]) -> None:
    assert [a.layer for a in adapt(target_modules=["k_proj"], layers=layers)] == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], "lora.layers: 4 is outside this model's layers 0-3"),
        ("0,2-7", "lora.layers: 2-7 is outside this model's layers 0-3"),
        ("9-", "lora.layers: 9- is outside this model's layers 0-3"),
        ("3-1", "lora.layers: 3-1 is outside this model's layers 0-3"),
        ("all", "lora.layers: 'all' is neither a layer nor a range such as 0-3 or 8-"),
        ("0,,2", "lora.layers: '' is neither a layer nor a range such as 0-3 or 8-"),
        ([-1], "lora.layers: '-1' is neither a layer nor a range such as 0-3 or 8-"),
    ],
)
def test_layers_refused(layers: list[int] | str, message: str) -> None:
    assert refusal(layers=layers) == message


def test_the_first_pattern_that_matches_wins() -> None:
    specific = r"layers\.2\.self_attn\.k_proj"
    general = "k_proj"
    for patterns, ranks in (
        ({specific: 9, general: 5}, [5, 5, 9, 5]),
        ({general: 5, specific: 9}, [5, 5, 5, 5]),
    ):
        adapted = adapt(rank=2, target_modules=["k_proj", "o_proj"], rank_pattern=patterns)
        assert [a.rank for a in adapted if a.name == "k_proj"] == ranks
        assert {a.rank for a in adapted if a.name == "o_proj"} == {2}
        alphas = {key: float(rank) for key, rank in patterns.items()}
        adapted = adapt(
            rank=4, alpha=2.0, target_modules=["k_proj", "o_proj"], alpha_pattern=alphas
        )
        assert [a.alpha for a in adapted if a.name == "k_proj"] == [float(r) for r in ranks]
        assert [a.scale for a in adapted if a.name == "k_proj"] == [r / 4 for r in ranks]
        assert {a.alpha for a in adapted if a.name == "o_proj"} == {2.0}


def test_expert_rank_is_for_routed_experts_that_no_pattern_names() -> None:
    adapted = adapt(MIXED_SHAPE, rank=6, expert_rank=3, rank_pattern={"down_proj": 10})
    for a in adapted:
        if a.name == "down_proj":
            rank = 10
        elif a.name in ("gate_proj", "up_proj") and a.layer in MIXED_SHAPE.moe_layers:
            rank = 3
        else:
            # attention, and the MLP of layer 1, which has no experts
            rank = 6
        assert a.rank == rank, (a.layer, a.name)
    assert {a.rank for a in adapt(rank=6, expert_rank=3, target_modules=["gate"])} == {6}, (
        "the router is no expert"
    )


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 12 / 9), (True, 12 / 3)])
def test_scale(use_rslora: bool, scale: float) -> None:
    adapted = adapt(rank=4, alpha=12.0, use_rslora=use_rslora, rank_pattern={"v_proj": 9})
    assert {a.scale for a in adapted if a.name == "v_proj"} == {scale}
    assert {a.scale for a in adapted if a.name != "v_proj"} == {12 / (2 if use_rslora else 4)}


ADAPTABLE = (
    "Adaptable: down_proj, gate, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
)
ADAPTABLE_DENSE = ADAPTABLE.replace(" gate,", "")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            MOE_SHAPE,
            {"target_modules": ["k_proj", "q_porj"]},
            (
                "lora.target_modules: 'q_porj' matches nothing in this model; did you mean q_proj?"
                f" {ADAPTABLE}"
            ),
        ),
        (
            MOE_SHAPE,
            {"target_modules": "linear_fc3"},
            (
                "lora.target_modules: 'linear_fc3' matches nothing in this model; did you mean"
                f" linear_fc2? {ADAPTABLE}"
            ),
        ),
        (
            MOE_SHAPE,
            {"target_modules": ["wte"]},
            f"lora.target_modules: 'wte' matches nothing in this model. {ADAPTABLE}",
        ),
        (
            DENSE_SHAPE,
            {"target_modules": ["router"]},
            f"lora.target_modules: 'router' matches nothing in this model. {ADAPTABLE_DENSE}",
        ),
        (
            DENSE_SHAPE,
            {"target_modules": [r"experts\.\d+\.up_proj"]},
            (
                r"lora.target_modules: 'experts\\.\\d+\\.up_proj' matches nothing in this model."
                rf" {ADAPTABLE_DENSE}"
            ),
        ),
        (
            MOE_SHAPE,
            {"exclude_modules": ["lm_heat"]},
            (
                "lora.exclude_modules: 'lm_heat' matches nothing in this model; did you mean"
                f" lm_head? {ADAPTABLE}"
            ),
        ),
        (
            MOE_SHAPE,
            {"target_modules": ["proj"]},
            (
                "lora.target_modules: 'proj' matches nothing in this model; did you mean v_proj?"
                f" {ADAPTABLE}"
            ),
        ),
        (
            MOE_SHAPE,
            {"target_modules": [r"(?:(\w|\.)+|(\w|\.))+(X|Y)"]},
            (
                r"lora.target_modules: '(?:(\\w|\\.)+|(\\w|\\.))+(X|Y)' takes too long to match"
                " names such as model.layers.0.self_attn.q_proj, in PEFT too. Repetition within"
                " repetition does that; write the names out, or write the expression without it."
            ),
        ),
        (
            MOE_SHAPE,
            {"rank_pattern": {"oproj": 4}},
            (
                "lora.rank_pattern: 'oproj' matches nothing in this model; did you mean o_proj?"
                f" {ADAPTABLE}"
            ),
        ),
        (
            MOE_SHAPE,
            {"alpha_pattern": {r"layers\.9\..*": 4.0}},
            rf"lora.alpha_pattern: 'layers\\.9\\..*' matches nothing in this model. {ADAPTABLE}",
        ),
        (
            MOE_SHAPE,
            {"target_modules": [r"mlp\.experts\.[0-2]\.down_proj"]},
            r"lora.target_modules: 'mlp\\.experts\\.[0-2]\\.down_proj' matches 3 of the 5 experts"
            r" in layer 0 "
            "(model.layers.0.mlp.experts.0.down_proj, ...); experts of one layer share one setting,"
            " so match all or "
            "none.",
        ),
        (
            MOE_SHAPE,
            {"target_modules": [r"layers\.2\.mlp\..*\.0\.up_proj"]},
            r"lora.target_modules: 'layers\\.2\\.mlp\\..*\\.0\\.up_proj' matches 1 of the 5 experts"
            r" in layer 2 "
            "(model.layers.2.mlp.experts.0.up_proj, ...); experts of one layer share one setting,"
            " so match all or none.",
        ),
        (
            MOE_SHAPE,
            {"rank_pattern": {r".*\.4\.gate_proj": 2}},
            r"lora.rank_pattern: '.*\\.4\\.gate_proj' matches 1 of the 5 experts in layer 0 "
            "(model.layers.0.mlp.experts.4.gate_proj, ...); experts of one layer share one setting,"
            " so match all or "
            "none.",
        ),
        (
            MOE_SHAPE,
            {"target_modules": ["*_proj"]},
            (
                "lora.target_modules: '*_proj' is neither a name nor a regular expression (nothing"
                " to repeat)"
            ),
        ),
        (
            MOE_SHAPE,
            {"exclude_modules": ["q_proj("]},
            (
                "lora.exclude_modules: 'q_proj(' is neither a name nor a regular expression "
                "(missing ), unterminated subpattern)"
            ),
        ),
        (
            MOE_SHAPE,
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            (
                "lora: nothing is left to adapt after target_modules, exclude_modules and layers;"
                " widen one of them"
            ),
        ),
        (
            MOE_SHAPE,
            {"target_modules": []},
            (
                "lora: nothing is left to adapt after target_modules, exclude_modules and layers;"
                " widen one of them"
            ),
        ),
        (
            MIXED_SHAPE,
            {"target_modules": ["gate"], "layers": [1]},
            (
                "lora: nothing is left to adapt after target_modules, exclude_modules and layers;"
                " widen one of them"
            ),
        ),
    ],
)
def test_refused(shape: ModelShape, options: dict[str, Any], message: str) -> None:
    assert refusal(shape, **options) == message


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        ({"rank": 7, "target_modules": ["q_proj"]}, {}),
        ({"rank": 7, "target_modules": ["k_proj", "o_proj", "v_proj", "lm_head"]}, {}),
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
    # On a MoE model PEFT 0.21 reduces an expression to its last names, and so adapts every layer.
    assert_trains_what_stock_peft_trains(
        tiny_dense, {"rank": 3, "target_modules": r".*\.[13]\..*\.(k|down)_proj"}, {}
    )


def assert_trains_what_stock_peft_trains(
    base: Path, options: dict[str, Any], patterns: dict[str, Any]
) -> None:
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
    s = MIXED_SHAPE
    adapted = adapt(
        s,
        target_modules=["gate", *MLP_NAMES],
        rank_pattern={"gate_proj": 2, "up_proj": 3, "down_proj": 7},
    )
    experts = s.num_experts * (2 + 3 + 7) * (s.hidden + s.expert_intermediate)
    dense = (2 + 3 + 7) * (s.hidden + s.intermediate)
    # The router has the default rank of 16; three of the four layers have experts.
    router = 16 * (s.hidden + s.num_experts)
    assert sum(a.num_parameters() for a in adapted) == 3 * (experts + router) + dense
    assert sum(a.num_parameters() for a in adapted if a.layer == 1) == dense


def test_fused_weights_hold_their_projections_in_the_order_of_megatron() -> None:
    modules: dict[str, list[str]] = {}
    for p in (*ATTENTION, *MOE, *DENSE_MLP, *HEAD):
        modules.setdefault(p.module, []).append(p.name)
    assert modules == {
        "self_attention.linear_qkv": ["q_proj", "k_proj", "v_proj"],
        "self_attention.linear_proj": ["o_proj"],
        "mlp.router": ["gate"], "mlp.experts.gate_up": ["gate_proj", "up_proj"],
        "mlp.experts.down": ["down_proj"],
        "mlp.linear_fc1": ["gate_proj", "up_proj"], "mlp.linear_fc2": ["down_proj"],
        "output_layer": ["lm_head"],
    }  # fmt: skip
    groups = {p.name: p.row_groups(MOE_SHAPE) for p in (*ATTENTION, *MOE, *HEAD)}
    assert groups == dict.fromkeys(groups, 1) | {
        "q_proj": 2,
        "k_proj": 2,
        "v_proj": 2,
    }, "one block per query group"


def test_groups_of_the_table() -> None:
    over_etp = {kind for kind, layout in SHARDINGS.items() if layout.group == "etp"}
    assert over_etp == {"expert_column", "expert_row"}
    assert {p.kind for p in (*ATTENTION, *MOE, *SHARED_EXPERT, *DENSE_MLP, *HEAD)} == set(SHARDINGS)
    for p in (*ATTENTION, *MOE, *DENSE_MLP, *HEAD):
        assert p.is_expert == (p.kind in over_etp), p.name


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "projection",
    [*ATTENTION, *MOE, *SHARED_EXPERT, *DENSE_MLP, *HEAD],
    ids=lambda p: p.hf.split("}.", 1)[-1],
)
def test_shards_make_up_the_whole_adapter_and_its_gradients(
    projection: Projection, ranks: int
) -> None:
    """Each rank computes ``B_i A_i x_i`` with its shards; split outputs are joined, partial ones
    added.

    The gradient of a split factor is then its shard of the whole gradient, that of a replicated one
    the sum over ranks: the two cases the table stands for. The router splits nothing but the
    tokens.
    """
    shape = replace(MOE_SHAPE, num_kv_heads=4, num_heads=12, shared_intermediate=112)
    layout = SHARDINGS[projection.kind]
    out, into = projection.features(shape)
    rank = 3
    tokens = 8
    generator = torch.Generator().manual_seed(ranks)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    a = normal(rank, into)
    b = normal(out, rank)
    x = normal(tokens, into)
    dy = normal(tokens, out)
    whole = gradients(a, b, x, dy)
    # The dimension of x [tokens, in] and of dy [tokens, out] in which ranks differ, if any.
    x_dim = 1 if layout.split_a == 1 else None
    y_dim = 1 if layout.split_b == 0 else None
    if projection.kind == "router":
        x_dim = 0
        y_dim = 0
    a_shards = shards(a, layout.split("A"), ranks)
    b_shards = shards(b, layout.split("B"), ranks)
    xs = shards(x, x_dim, ranks)
    dys = shards(dy, y_dim, ranks)
    parts = [gradients(*own) for own in zip(a_shards, b_shards, xs, dys, strict=True)]
    torch.testing.assert_close(joined([part[0] for part in parts], y_dim), whole[0])
    for at, factor in ((1, "A"), (2, "B")):
        split = layout.split(factor)  # type: ignore[arg-type]
        torch.testing.assert_close(joined([part[at] for part in parts], split), whole[at])


def joined(parts: list[Tensor], dim: int | None) -> Tensor:
    """The whole of what ranks hold: shards side by side, or the sum of partial sums."""
    return torch.stack(parts).sum(0) if dim is None else torch.cat(parts, dim)


def shards(whole: Tensor, dim: int | None, ranks: int) -> list[Tensor]:
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
    for rank in (1, 2, 5, 16):
        (adapted,) = adapt(rank=rank, alpha=3.0, use_rslora=True, target_modules=["lm_head"])
        assert adapted.scale == pytest.approx(3.0 / math.sqrt(rank), rel=1e-15)
