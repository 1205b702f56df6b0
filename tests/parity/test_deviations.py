"""What the grid measures by sees a number that is none, wherever it stands."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.parity import spread
from tests.oracles.training import Trained
from tests.parity.case import Expected, deviations, exceeded
from tests.parity.grid import Case

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


def test_losses_are_compared_within_a_question() -> None:
    """Objective, balance and base are asked about, and a layout is not."""
    row = {**vars(Case(2, tp=2)), "losses": [-0.5, 0.25], "case": "a name", "batch": 4}
    other_layout = row | vars(Case(4, tp=2)) | {"losses": [-0.5, 0.2501]}
    rows = [row, other_layout]
    for case in (Case(2, objective="dpo"), Case(2, balance="on"), Case(2, base="nf4")):
        rows.append(row | vars(case) | {"losses": [7.0, 7.0]})
    # Of the largest loss of these runs: one of them may be near zero.
    assert spread(rows) == pytest.approx(0.0001 / 0.5)
    # An older record knows no base.
    del row["base"]
    assert spread(rows) == pytest.approx(0.0001 / 0.5)


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
