"""Select the linears that a ``lora`` section adapts, with rank and scale, and refuse what matches
nothing."""

from itertools import product
from typing import Any

import pytest

from megalora.lora.select import ALIASES
from megalora.model.shape import ModelShape
from tests.lora.shapes import (
    ATTENTION_NAMES,
    DENSE_SHAPE,
    MIXED_SHAPE,
    MLP_NAMES,
    MOE_SHAPE,
    adapt,
    places,
    refusal,
)

# Megatron's fused linears and vLLM's; a second copy of the product's table, so that a change of it
# is noticed.
EXPANSIONS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "linear_qkv": ["q_proj", "k_proj", "v_proj"],
    "linear_proj": ["o_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "linear_fc1": ["gate_proj", "up_proj"],
    "linear_fc2": ["down_proj"],
}


def in_layers(name: str, *layers: int) -> list[tuple[int | None, str]]:
    """One linear in each of ``layers``, as ``places`` has it; in all four without any."""
    return [(layer, name) for layer in layers or range(4)]


@pytest.mark.parametrize(
    "shape", [MOE_SHAPE, MIXED_SHAPE, DENSE_SHAPE], ids=["moe", "mixed", "dense"]
)
def test_all_linear_leaves_out_router_and_output_layer(shape: ModelShape) -> None:
    assert places(adapt(shape)) == list(product(range(4), ATTENTION_NAMES + MLP_NAMES))


@pytest.mark.parametrize(("alias", "names"), EXPANSIONS.items())
def test_aliases(alias: str, names: list[str]) -> None:
    assert places(adapt(MIXED_SHAPE, target_modules=[alias])) == list(product(range(4), names))
    # In patterns and exclusions an alias means the same as among targets.
    for a in adapt(MIXED_SHAPE, rank=3, rank_pattern={alias: 11}):
        assert a.rank == (11 if a.name in names else 3), a.name
    left = adapt(MIXED_SHAPE, exclude_modules=[alias])
    assert {a.name for a in left} == {*ATTENTION_NAMES, *MLP_NAMES} - {*names}


def test_aliases_are_all_tested() -> None:
    assert EXPANSIONS.keys() == ALIASES.keys()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # A string is one entry, and may be an expression.
        ({"target_modules": "o_proj"}, in_layers("o_proj")),
        (
            {"target_modules": "q_proj|v_proj"},
            list(product(range(4), ("q_proj", "v_proj"))),
        ),
        ({"target_modules": r"layers\.[13]\..*o_proj"}, in_layers("o_proj", 1, 3)),
        # The router, and not gate_proj: a name ends at a dot. Layer 1 is dense.
        ({"target_modules": ["gate"]}, in_layers("gate", 0, 2, 3)),
        # Experts apart from the dense layer's MLP, and the other way round.
        ({"target_modules": [r"experts\.\d+\.down_proj"]}, in_layers("down_proj", 0, 2, 3)),
        ({"target_modules": [r"mlp\.up_proj"]}, in_layers("up_proj", 1)),
        # ``layers`` does not speak of the head, which is in none.
        (
            {"target_modules": ["v_proj", "lm_head"], "layers": [2]},
            [(2, "v_proj"), (None, "lm_head")],
        ),
        # Exclusions win over targets, all-linear among them.
        ({"exclude_modules": ["qkv_proj", r".*\.mlp\..*"]}, in_layers("o_proj")),
        (
            {"target_modules": ["up_proj"], "exclude_modules": [r"experts\..*"]},
            in_layers("up_proj", 1),
        ),
        (
            {
                "target_modules": ["k_proj"],
                "exclude_modules": [r"layers\.0\.self_attn\.k_proj"],
                "layers": "0-1",
            },
            in_layers("k_proj", 1),
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
        # In the model's order, each once.
        ([3, 0, 3], [0, 3]),
        ("1", [1]),
        # Ends belong to a range.
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
        # It would select nothing.
        ("3-1", "lora.layers: 3-1 is outside this model's layers 0-3"),
        ("all", "lora.layers: 'all' is neither a layer nor a range such as 0-3 or 8-"),
        ("0,,2", "lora.layers: '' is neither a layer nor a range such as 0-3 or 8-"),
        # The last layer in Python, but nobody says so here.
        ([-1], "lora.layers: '-1' is neither a layer nor a range such as 0-3 or 8-"),
    ],
)
def test_layers_refused(layers: list[int] | str, message: str) -> None:
    assert refusal(layers=layers) == message


def test_the_first_pattern_that_matches_wins() -> None:
    """As in PEFT: the order of keys decides, not how much a key says."""
    targets = ["k_proj", "o_proj"]
    assert len(adapt(target_modules=targets)) == 2 * 4
    specific = r"layers\.2\.self_attn\.k_proj"
    general = "k_proj"
    # Patterns, and what they give k_proj in each layer; o_proj is in none and keeps rank and alpha.
    for patterns, of_layer in (
        ({specific: 9, general: 5}, [5, 5, 9, 5]),
        ({general: 5, specific: 9}, [5, 5, 5, 5]),
    ):
        for a in adapt(rank=2, target_modules=targets, rank_pattern=patterns):
            assert a.layer is not None
            assert a.rank == (of_layer[a.layer] if a.name == "k_proj" else 2)
        for a in adapt(rank=4, alpha=2.0, target_modules=targets, alpha_pattern=patterns):
            assert a.layer is not None
            alpha = of_layer[a.layer] if a.name == "k_proj" else 2.0
            assert (a.alpha, a.scale) == (alpha, alpha / 4)


ADAPTABLE = (
    "Adaptable: down_proj, gate, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
)
# A dense model has no router.
ADAPTABLE_DENSE = ADAPTABLE.replace(" gate,", "")
NOTHING_LEFT = (
    "lora: nothing is left to adapt after target_modules, exclude_modules and layers; widen one of"
    " them"
)


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
        # Aliases are suggested too.
        (
            MOE_SHAPE,
            {"target_modules": "linear_fc3"},
            (
                "lora.target_modules: 'linear_fc3' matches nothing in this model; did you mean"
                f" linear_fc2? {ADAPTABLE}"
            ),
        ),
        # GPT-2's embedding is close to no name of this model.
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
        # The end of many names, but not from a dot on; PEFT would not take it either.
        (
            MOE_SHAPE,
            {"target_modules": ["proj"]},
            (
                "lora.target_modules: 'proj' matches nothing in this model; did you mean v_proj?"
                f" {ADAPTABLE}"
            ),
        ),
        # Nested repetition that even ``regex`` cannot match in its half second.
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
        # Experts of a layer are trained as one stacked parameter: one rank and one scale.
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
            {"alpha_pattern": {r".*\.4\.gate_proj": 2}},
            r"lora.alpha_pattern: '.*\\.4\\.gate_proj' matches 1 of the 5 experts in layer 0 "
            "(model.layers.0.mlp.experts.4.gate_proj, ...); experts of one layer share one setting,"
            " so match all or "
            "none.",
        ),
        # A wildcard of the shell.
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
            NOTHING_LEFT,
        ),
        (
            MOE_SHAPE,
            {"target_modules": []},
            NOTHING_LEFT,
        ),
        # The one layer that has no router.
        (
            MIXED_SHAPE,
            {"target_modules": ["gate"], "layers": [1]},
            NOTHING_LEFT,
        ),
    ],
)
def test_refused(shape: ModelShape, options: dict[str, Any], message: str) -> None:
    assert refusal(shape, **options) == message
