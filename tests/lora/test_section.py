"""The lora section written for an adapter made elsewhere resolves to that very adapter."""

from typing import Any

import pytest

from megalora.config import LoRAConfig
from megalora.lora.section import differing, lora_section, settings
from megalora.lora.select import resolve
from tests.parity.models import shape_of

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {
        "target_modules": [*NAMES, "lm_head"],
        "rank_pattern": {"q_proj": 3, "lm_head": 2},
        "alpha_pattern": {"up_proj": 5.0},
    },
    {"use_rslora": True, "rank": 5, "expert_rank": 3},
    {"layers": "1-2", "target_modules": ["v_proj", r"layers\.2\..*down_proj"]},
    {
        "rank_pattern": {r"layers\.[13]\.self_attn\.o_proj": 7},
        "alpha_pattern": {r"layers\.0\..*\.k_proj": 0.3},
    },
    {"rank": 49, "alpha": 1.0},
]


@pytest.mark.parametrize("model", ["moe", "mixed", "shared", "dense"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_section_for_what_is_adapted(options: dict[str, Any], model: str) -> None:
    adapted = resolve(LoRAConfig(**options), shape_of(model))
    again = resolve(LoRAConfig(**lora_section(adapted, shape_of(model))), shape_of(model))
    for read, given in zip(again, adapted, strict=True):
        assert (read.projection, read.layer, read.rank) == (
            given.projection,
            given.layer,
            given.rank,
        )
        # alpha = scale * rank is written in decimal and divided again
        assert read.scale == pytest.approx(given.scale, rel=1e-12)


def test_a_section_is_as_short_as_it_can_be() -> None:
    adapted = resolve(LoRAConfig(rank=4, alpha=8.0, rank_pattern={"q_proj": 2}), shape_of("moe"))
    assert lora_section(adapted, shape_of("moe")) == {
        "rank": 4, "alpha": 8.0, "target_modules": NAMES, "rank_pattern": {"q_proj": 2},
    }  # fmt: skip


def test_differences_are_named() -> None:
    shape = shape_of("moe")
    ours = settings(resolve(LoRAConfig(rank=4, alpha=8.0), shape))
    assert differing(ours, ours) == []
    theirs = settings(
        resolve(LoRAConfig(rank=4, alpha=8.0, layers="0-2", rank_pattern={"o_proj": 2}), shape)
    )
    apart = differing(ours, theirs)
    assert (
        apart[:2]
        == ["model.layers.0.mlp.experts.*.down_proj", "model.layers.3.mlp.experts.*.down_proj"][1:]
        + apart[1:2]
    )
    # ``model.layers.3.…``: o_proj has another rank in all layers, the rest differs in the last.
    of_o_proj = [name for name in apart if "o_proj" in name]
    others = [name for name in apart if "o_proj" not in name]
    assert {name.split(".")[2] for name in of_o_proj} == {"0", "1", "2", "3"}
    assert {name.split(".")[2] for name in others} == {"3"}
    rescaled = settings(
        resolve(LoRAConfig(rank=4, alpha=8.0, alpha_pattern={"k_proj": 9.0}), shape)
    )
    assert differing(ours, rescaled) == [f"model.layers.{n}.self_attn.k_proj" for n in range(4)]
