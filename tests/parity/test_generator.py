"""No layout that the config accepts is left out of the grid, and no pair of values."""

from dataclasses import asdict
from itertools import combinations, product

from megalora.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from tests.parity.grid import QUICK, Case, full_grid, layouts, variants
from tests.parity.models import ADAPTERS, MODELS, shape_of

SIZES = {
    "world": (1, 2, 4, 8),
    "tp": (1, 2, 4),
    "pp": (1, 2),
    "vpp": (1, 2),
    "ep": (1, 2, 4),
    "etp": (1, 2),
}


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


def test_no_accepted_layout_is_left_out() -> None:
    possible = {
        values
        for values in product(*SIZES.values())
        if any(
            taken_by_the_config(model, **dict(zip(SIZES, values, strict=True))) for model in MODELS
        )
    }
    tested = {tuple(asdict(case)[name] for name in SIZES) for case in full_grid()}
    assert tested == possible
    assert len(possible) == len(layouts()) > 80


def test_every_possible_pair_of_values_is_tested() -> None:
    def pairs(case: Case) -> set:
        return set(combinations(asdict(case).items(), 2))

    possible = set().union(*(pairs(case) for layout in layouts() for case in variants(layout)))
    assert set().union(*(pairs(case) for case in full_grid())) == possible


def test_a_quick_case_for_every_value() -> None:
    for factor, values in {
        **SIZES, "model": tuple(MODELS), "adapter": tuple(ADAPTERS),
        "recompute": ("off", "selective", "full"), "micro": (1, 3)
    }.items():  # fmt: skip
        assert {asdict(case)[factor] for case in QUICK} == set(values), factor
        assert {asdict(case)[factor] for case in full_grid()} == set(values), factor
