"""Draw A's initial values: Kaiming-uniform as torch does it, a function of seed and name alone."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from megalora.lora.init import initial_a

MODULE = "model.layers.3.mlp.experts.7.gate_proj"


# The bound is 1/sqrt(in_features): close to square, wide and tall matrices, so that a fan-in taken
# from the wrong dimension shows.
@pytest.mark.parametrize(("rank", "in_features"), [(300, 400), (64, 1000), (2000, 48)])
def test_distribution_is_that_of_peft(rank: int, in_features: int) -> None:
    a = initial_a(0, MODULE, rank, in_features)
    assert (a.shape, a.dtype, a.device.type) == ((rank, in_features), torch.float32, "cpu")
    torch.manual_seed(1)
    peft = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))
    bound = 1 / math.sqrt(in_features)
    count = rank * in_features
    # Extremes of n uniform draws lie within 20 / n of the bound but for one in e^10; moments err by
    # 1/sqrt(n), 5 sigma.
    for values in (a, peft):
        assert bound * (1 - 20 / count) < values.max() <= bound
        assert -bound <= values.min() < -bound * (1 - 20 / count)
        assert values.mean().abs() < 5 * bound / math.sqrt(3 * count)
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(count))
    # Kolmogorov-Smirnov of two samples: 2.5 / sqrt(n / 2) is passed by chance once in 10^5.
    assert largest_gap(a, peft) < 2.5 / math.sqrt(count / 2)


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Largest distance of two empirical distribution functions, at every drawn value; both have as
    many values."""
    one = one.flatten().sort().values
    other = other.flatten().sort().values
    at = torch.cat([one, other])
    # How many values of each are at most ``at``: the distribution function times their number.
    one_below = torch.searchsorted(one, at, right=True)
    other_below = torch.searchsorted(other, at, right=True)
    return (one_below - other_below).abs().max().item() / len(one)


def test_rows_and_columns_are_independent() -> None:
    a = initial_a(0, MODULE, 40, 500)
    correlation = torch.corrcoef(a) - torch.eye(40)
    assert correlation.abs().max() < 6 / math.sqrt(500), (
        "780 pairs of rows, each with error 1/sqrt(500)"
    )


def test_same_arguments_give_the_same_values() -> None:
    torch.testing.assert_close(
        initial_a(5, MODULE, 3, 7), initial_a(5, MODULE, 3, 7), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("seed", "module"),
    [
        (1, MODULE),
        # A generator that took the seed modulo 2^32, or without its sign, would repeat itself.
        (-5, MODULE),
        (5 + 2**32, MODULE),
        # Neighbours in the model: projection, expert, layer, and a dense layer's.
        (5, "model.layers.3.mlp.experts.7.up_proj"),
        (5, "model.layers.3.mlp.experts.8.gate_proj"),
        (5, "model.layers.4.mlp.experts.7.gate_proj"),
        (5, "model.layers.3.mlp.gate_proj"),
    ],
)
def test_seeds_and_names_draw_different_values(seed: int, module: str) -> None:
    one = initial_a(5, MODULE, 30, 70).flatten()
    other = initial_a(seed, module, 30, 70).flatten()
    correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
    # Of n independent pairs it is 0 with a standard deviation of 1/sqrt(n).
    assert correlation.abs() < 5 / math.sqrt(30 * 70)


def test_no_two_modules_of_a_model_share_a_generator() -> None:
    names = []
    first = set()
    for n, e, p in product(range(6), range(32), ("up_proj", "gate_proj")):
        name = f"model.layers.{n}.mlp.experts.{e}.{p}"
        names.append(name)
        first.add(initial_a(0, name, 1, 2)[0, 0].item())
    assert len(first) == len(names), (
        "384 draws of 24 bits collide by chance once in 200 seeds; this seed does not"
    )


def test_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = initial_a(5, MODULE, 3, 7)
    # Dropout draws from it: with an adapter more it would draw other numbers.
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    torch.testing.assert_close(initial_a(5, MODULE, 3, 7), one, rtol=0, atol=0)


def test_values_are_pinned() -> None:
    """A seed stays the same adapter from one version to the next."""
    expected = [[-0.3722, -0.4203, -0.2757], [-0.2388, 0.0670, -0.5172]]
    torch.testing.assert_close(
        initial_a(0, "lm_head", 2, 3), torch.tensor(expected), rtol=0, atol=1e-4
    )
