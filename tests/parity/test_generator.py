"""No layout that the config accepts is left out of the grid, and no pair of values."""

from dataclasses import replace
from itertools import combinations, product

import pytest

from megalora.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from tests.parity.grid import PACKED, Case, full_grid, layouts, variants
from tests.parity.models import ADAPTERS, MODELS, shape_of
from tests.parity.quick_cases import QUICK

SIZES = {
    "world": (1, 2, 4, 8),
    "tp": (1, 2, 4),
    "pp": (1, 2),
    "vpp": (1, 2),
    "ep": (1, 2, 4),
    "etp": (1, 2),
    "cp": (1, 2, 4),
}


OBJECTIVES = (
    "sft", "dpo", "dpo of start", "kto", "classify", "reward", "distill", "distill base", "grpo",
    "grpo routed", "grpo of start",
)  # fmt: skip
NOT_SCORED = {
    ("head", "whole"), ("adapter", "router"), ("adapter", "some dora"), ("model", "olmoe"),
    ("model", "glm4_moe"),
    ("adapter", "dora"), ("adapter", "saved"), ("adapter", "tokens"),
}  # fmt: skip
"""What no score head goes with: whole logits, an adapted lm_head, DoRA, weights of the base,
families of which transformers has no classifier."""
WITH_NORMS = {("adapter", "dora"), ("adapter", "some dora")}


def taken_by_the_config(model: str, world: int, **sizes: int) -> bool:
    """With a batch that any number of ranks and stages divides, so that only the layout can be
    refused."""
    try:
        parallel = ParallelConfig(**sizes)
        train = TrainConfig(steps=1, global_batch_size=48, micro_batch_size=3)
        RunConfig(
            model=ModelConfig(path="-"), data=DataConfig(train="-"), parallel=parallel, train=train
        ).check_world(world)
        shape_of(model).check_layout(parallel)
    except ValueError:
        return False
    return True


@pytest.mark.slow
def test_no_accepted_layout_is_left_out() -> None:
    possible = set()
    for values in product(*SIZES.values()):
        sizes = dict(zip(SIZES, values, strict=True))
        # One model that may have the layout is enough: it stands for the layout in the grid.
        if any(taken_by_the_config(model, **sizes) for model in MODELS):
            possible.add(values)
    tested = set()
    for case in full_grid():
        tested.add((case.world, case.tp, case.pp, case.vpp, case.ep, case.etp, case.cp))
    assert tested == possible
    # Were the config to refuse everything, nothing possible would be left out either.
    assert len(possible) == len(layouts()) > 80


@pytest.mark.slow
def test_every_possible_pair_of_values_is_tested() -> None:
    # Not ``Case.pairs``, by which the grid was chosen.
    def pairs(case: Case) -> set:
        return set(combinations(vars(case).items(), 2))

    num_layers = {model: shape_of(model).num_layers for model in MODELS}
    possible = set()
    for layout in layouts():
        for case in variants(layout):
            possible |= pairs(case)
            # Stages that are not equal go with every pipeline whose parts have several layers.
            if case.pp > 1 and num_layers[case.model] > case.pp * case.vpp:
                possible |= pairs(replace(case, stages="uneven"))
    # The base as well as what follows goes with everything: its pairs are added last.
    possible = {pair for pair in possible if pair[1][0] != "base"}
    # Cutting samples and the head go with everything.
    ways = list(
        product(("left_out", "truncate_right", "truncate_left", "split"), ("lean", "whole"))
    )
    values = {value for pair in possible for value in pair}
    for too_long, head in ways:
        of_samples = (("too_long", too_long), ("head", head))
        possible.add(of_samples)
        for factor, value in values:
            if factor not in ("too_long", "head", "objective", "balance"):
                possible |= {((factor, value), each) for each in of_samples}
    # So does each objective, but that pairs are never cut, and that a score head stands where
    # lm_head would be adapted, has no logits, is not of every family and not beside DoRA or weights
    # of the base. Norms of DoRA are not kept of a run's start.
    for objective in OBJECTIVES:
        of_loss = ("objective", objective)
        for factor, value in {value for pair in possible for value in pair}:
            is_scored = objective in ("classify", "reward")
            is_cut = factor == "too_long" and value != "left_out"
            is_other = objective != "sft" and is_cut
            is_other |= is_scored and (factor, value) in NOT_SCORED
            is_other |= objective.endswith("of start") and (factor, value) in WITH_NORMS
            # What no router chooses nobody can have chosen for it.
            is_dense = factor == "model" and not shape_of(value).moe_layers
            is_other |= objective.endswith("routed") and is_dense
            if factor not in ("objective", "balance") and not is_other:
                possible.add(((factor, value), of_loss))
    # Balanced or not goes with everything, where there are experts.
    dense = {model for model in MODELS if not shape_of(model).moe_layers}
    for balance in ("off", "on"):
        for factor, value in {value for pair in possible for value in pair}:
            nothing_to_do = balance == "on" and factor == "model" and value in dense
            if factor != "balance" and not nothing_to_do:
                possible.add(((factor, value), ("balance", balance)))
    # A base that stays codes goes with everything.
    for value in {value for pair in possible for value in pair}:
        for base in ("plain", "fp8", "nf4"):
            possible.add((value, ("base", base)))
    tested = set()
    for case in full_grid():
        tested |= pairs(case)
    assert tested == possible


def test_a_quick_case_for_every_value() -> None:
    values_of = {
        **SIZES, "model": tuple(MODELS), "adapter": tuple(ADAPTERS),
        "recompute": ("off", "selective", "full", "full1+selective"), "micro": (1, 3, PACKED),
        "head": ("lean", "whole"), "stages": ("equal", "uneven"),
        "objective": OBJECTIVES,
        "balance": ("off", "on"),
        "base": ("plain", "fp8", "nf4"),
        "too_long": ("left_out", "truncate_right", "truncate_left", "split"),
    }  # fmt: skip
    for factor, values in values_of.items():
        for cases in (QUICK, full_grid()):
            assert {getattr(case, factor) for case in cases} == set(values), factor
