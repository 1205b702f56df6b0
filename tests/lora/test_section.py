"""Write a ``lora`` section for an adapter made elsewhere: it must resolve to that very adapter."""

from typing import Any

import pytest

from megalora.config import LoRAConfig
from megalora.lora.section import differing, lora_section, settings
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from tests.parity.models import shape_of

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: list[dict[str, Any]] = [
    {},
    # lm_head is no part of all-linear, so the section must list every target.
    {
        "target_modules": [*NAMES, "lm_head"],
        "rank_pattern": {"q_proj": 3, "lm_head": 2},
        "alpha_pattern": {"up_proj": 5.0},
    },
    # The section has neither option: alphas and rank_pattern must say the same.
    {"use_rslora": True, "rank": 5, "expert_rank": 3},
    # One projection in two layers, another in one: targets become expressions.
    {"layers": "1-2", "target_modules": ["v_proj", r"layers\.2\..*down_proj"]},
    # Settings of single layers: pattern keys become expressions.
    {
        "rank_pattern": {r"layers\.[13]\.self_attn\.o_proj": 7},
        "alpha_pattern": {r"layers\.0\..*\.k_proj": 0.3},
    },
    # 1 / 49 has no end in binary: alpha comes back as 49 * (1 / 49), which is not quite 1.
    {"rank": 49, "alpha": 1.0},
]


def adapted_moe(**options: Any) -> list[Adapted]:
    """The tiny MoE adapted with rank 4 and alpha 8, but for ``options``."""
    return resolve(LoRAConfig(rank=4, alpha=8.0, **options), shape_of("moe"))


@pytest.mark.parametrize("model", ["moe", "mixed", "shared", "dense"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_section_for_what_is_adapted(options: dict[str, Any], model: str) -> None:
    adapted = resolve(LoRAConfig(**options), shape_of(model))
    again = resolve(LoRAConfig(**lora_section(adapted, shape_of(model))), shape_of(model))
    for read, given in zip(again, adapted, strict=True):
        assert read.projection == given.projection
        assert read.layer == given.layer
        assert read.rank == given.rank
        # Scales, not alphas: alpha = scale * rank is written with 14 digits and divided again.
        assert read.scale == pytest.approx(given.scale, rel=1e-12)


def test_a_section_is_as_short_as_it_can_be() -> None:
    """Names and no expressions, because every setting holds in all layers."""
    adapted = adapted_moe(rank_pattern={"q_proj": 2})
    assert lora_section(adapted, shape_of("moe")) == {
        "rank": 4, "alpha": 8.0, "target_modules": NAMES, "rank_pattern": {"q_proj": 2},
    }  # fmt: skip


def test_differences_are_named() -> None:
    ours = settings(adapted_moe())
    assert differing(ours, ours) == []
    theirs = settings(adapted_moe(layers="0-2", rank_pattern={"o_proj": 2}))
    apart = differing(ours, theirs)
    # Of experts one name stands for all.
    assert apart[0] == "model.layers.3.mlp.experts.*.down_proj"
    # o_proj has another rank in all layers; the rest differs in the last, which they do not adapt.
    expected = {f"model.layers.{layer}.self_attn.o_proj" for layer in range(4)}
    for name in ("q_proj", "k_proj", "v_proj"):
        expected.add(f"model.layers.3.self_attn.{name}")
    for name in ("gate_proj", "up_proj", "down_proj"):
        expected.add(f"model.layers.3.mlp.experts.*.{name}")
    assert set(apart) == expected
    # Ranks are equal here, and scales are not.
    rescaled = settings(adapted_moe(alpha_pattern={"k_proj": 9.0}))
    assert differing(ours, rescaled) == [f"model.layers.{n}.self_attn.k_proj" for n in range(4)]
