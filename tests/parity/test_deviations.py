"""What the grid measures by sees a number that is none, wherever it stands."""

import math
from dataclasses import replace

import pytest
import torch

from tests.oracles.training import Trained
from tests.parity.case import Expected, deviations, exceeded

A = "base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight"
FACTORS = {A: torch.tensor([[0.5, -1.5, 0.25]])}
TRAINED = Trained(
    losses=[6.0, 5.5, 5.25],
    norms=[1.0, 2.0, 1.5],
    gradients=[FACTORS, FACTORS, FACTORS],
    adapter=FACTORS,
    exp_avg=FACTORS,
    exp_avg_sq=FACTORS,
)
RIGHT = Expected(6.5, TRAINED)


def test_equal_runs_do_not_deviate() -> None:
    assert not any(deviations(RIGHT, RIGHT).values())


# NaN behind numbers: ``max`` over a list keeps the number that came first.
@pytest.mark.parametrize(
    ("quantity", "field", "values"),
    [
        ("loss", "losses", [6.0, 5.5, math.nan]),
        ("grad norm", "norms", [1.0, math.nan, 1.5]),
        ("gradient", "gradients", [FACTORS, FACTORS, {A: torch.tensor([[0.5, math.nan, 0.25]])}]),
        ("adapters", "adapter", {A: torch.tensor([[0.5, -1.5, math.nan]])}),
    ],
)
def test_nan_exceeds_every_limit(quantity: str, field: str, values: object) -> None:
    spoilt = replace(RIGHT, trained=replace(TRAINED, **{field: values}))
    [said] = exceeded(deviations(spoilt, RIGHT))
    assert said.startswith(f"{quantity} ")
