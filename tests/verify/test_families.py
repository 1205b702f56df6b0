"""Run the layer check on every registered family: equal as loaded, at odds with a router of another
kind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.model.families import FAMILIES
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.verify.built import loaded, said


def _said_in_layouts(base: Path) -> str:
    """On two ranks that share attention and the dense MLPs, experts shared out between them."""
    parallel = {"tp": 2}
    # A dense family has no name for a number of experts, and no experts to share out.
    if FAMILIES[base.name].num_experts_names:
        parallel["ep"] = 2
    with loaded(base, parallel, "bfloat16") as (chunks, groups):
        return said(chunks, groups, base, torch.bfloat16)


# One with experts, one with a shared expert and one without; the others are in the long tail.
FAST = ("qwen3_moe", "qwen2_moe", "llama")
MARKED = [pytest.param(arch, marks=[] if arch in FAST else pytest.mark.slow) for arch in FAMILIES]


@pytest.mark.parametrize("arch", MARKED)
def test_a_family_is_equal_on_two_ranks(arch: str, tmp_path: Path) -> None:
    line = run_ranks(_said_in_layouts, 2, make_tiny(tmp_path / arch, arch=arch))[0]
    assert line.startswith("base: layer"), line


def _with_settings(base: Path, changes: list[dict[str, Any]]) -> list[str]:
    """What the check says when Megatron's config of a built model says something else."""
    lines = []
    with loaded(base, dtype="bfloat16") as (chunks, groups):
        config = chunks[0].config
        for change in changes:
            before = {name: getattr(config, name) for name in change}
            # Past the checks of Megatron's config, which is a dataclass.
            vars(config).update(change)
            lines.append(said(chunks, groups, base, torch.bfloat16))
            vars(config).update(before)
    return lines


# What Bridge or a family's settings could get wrong: the dtype that logits are computed in, whether
# softmax is taken before or after the choice, how GLM scores, groups and scales.
SPOILED: dict[str, list[dict[str, Any]]] = {
    "olmoe": [
        {"moe_router_dtype": "fp32"},
        {"moe_router_pre_softmax": False},
    ],
    "mixtral": [
        {"moe_router_dtype": "fp32"},
        {"moe_router_pre_softmax": True},
    ],
    "glm4_moe": [
        {"moe_router_dtype": None},
        {"moe_router_score_function": "softmax"},
        {"moe_router_num_groups": None},
        {"moe_router_group_topk": 3},
        {"moe_router_topk_scaling_factor": 1.0},
    ],
}


@pytest.mark.parametrize("arch", SPOILED)
def test_another_router_is_noticed(arch: str, tmp_path: Path) -> None:
    base = make_tiny(tmp_path / arch, arch=arch)
    lines = run_ranks(_with_settings, 1, base, SPOILED[arch])[0]
    for change, line in zip(SPOILED[arch], lines, strict=True):
        # Found in the router itself, not only in what experts make of it.
        assert "(MoE), router" in line, f"{change}: {line}"
