"""Give routed experts a rank of their own, as a number or by a rule."""

from typing import Any

import pytest

from tests.lora.shapes import DENSE_SHAPE, MIXED_SHAPE, adapt, refusal


def test_expert_rank_is_for_routed_experts_that_no_pattern_names() -> None:
    adapted = adapt(MIXED_SHAPE, rank=6, expert_rank=3, rank_pattern={"down_proj": 10})
    for a in adapted:
        if a.name == "down_proj":
            rank = 10
        elif a.name in ("gate_proj", "up_proj") and a.layer in MIXED_SHAPE.moe_layers:
            rank = 3
        else:
            # Attention, and the MLP of layer 1, which has no experts.
            rank = 6
        assert a.rank == rank, (a.layer, a.name)
    for router in adapt(rank=6, expert_rank=3, target_modules=["gate"]):
        assert router.rank == 6, "the router is no expert"


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("rule", "parts"), [("top_k", 3), ("experts", 5)])
def test_expert_rank_by_a_rule(rule: str, parts: int, use_rslora: bool) -> None:
    """The rank is divided, and experts keep the scale of everything else."""
    options: dict[str, Any] = {"use_rslora": use_rslora, "rank_pattern": {"down_proj": 2}}
    for a in adapt(MIXED_SHAPE, rank=30, alpha=12.0, expert_rank=rule, **options):
        rank, alpha = 30, 12.0
        if a.name == "down_proj":
            # Named by a pattern, in experts too, where alpha stays as it is.
            rank = 2
        elif a.projection.is_expert:
            rank = 30 // parts
            alpha = pytest.approx(12.0 / (parts**0.5 if use_rslora else parts))
        assert (a.rank, a.alpha) == (rank, alpha), (a.layer, a.name)
        divisor = rank**0.5 if use_rslora else rank
        if a.name != "down_proj":
            divisor = 30**0.5 if use_rslora else 30
        assert a.scale == pytest.approx(12.0 / divisor)
    # An alpha of its own is taken as it is given.
    for a in adapt(rank=30, expert_rank=rule, alpha_pattern={"up_proj": 4.0}):
        if a.name == "up_proj":
            assert (a.rank, a.alpha) == (30 // parts, 4.0)


def test_expert_rank_that_leaves_a_rest() -> None:
    assert refusal(rank=16, expert_rank="top_k") == (
        "lora.expert_rank=top_k divides lora.rank=16 by 3, the experts that a token is sent to,"
        " which leaves a rest. Set lora.rank=15 or 18, or lora.expert_rank to a number."
    )
    assert "by 5, the experts of a layer, which leaves a rest. Set lora.rank=5, or" in refusal(
        rank=4, expert_rank="experts"
    )
    # Without experts there is nothing to divide.
    assert {a.rank for a in adapt(DENSE_SHAPE, rank=16, expert_rank="top_k")} == {16}
