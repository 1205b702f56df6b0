"""KTO's loss against TRL's own, value and gradient in float64, over any division into rows; what is
reported against the definitions."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalora.objectives.kto import KTO
from megalora.objectives.objective import Sequences
from tests.distributed.ranks import run_ranks
from tests.objectives import trl_losses

N = 5
S = 9
GOOD = torch.tensor([True, False, True, True, False])
LOSS = KTO(beta=0.3, good_weight=1.3, bad_weight=0.6)
ROWS = ([5], [2, 3], [1, 0, 1, 3])
"""Samples of each row; a row without any is filler."""


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of model and reference, ``[2, N, S]`` each, of the samples and of the
    mismatched sequences, which are target tokens, and ``[N]`` labels."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, S, (2, N), generator=generator)
    mask = torch.arange(S) < lengths[..., None]
    model = -torch.rand(2, N, S, generator=generator).double() * 2 * mask
    reference = -torch.rand(2, N, S, generator=generator).double() * 2 * mask
    return model, reference, mask, GOOD


def found(objective: KTO, rows: list[int], up: float) -> tuple[float, Tensor, dict[str, Tensor]]:
    """(loss, gradient, metrics) of the samples in rows of so many, of whose tokens this rank of the
    world has every other one; a rank function. ``up``: what is added to each of the model's
    mismatched log-probabilities."""
    model, reference, mask, good = problem()
    model.requires_grad_()
    group: Any = dist.group.WORLD
    moved = (model[1].detach() + up * mask[1]).sum(-1).mean()
    means = {"mismatched": moved, "mismatched reference": reference[1].sum(-1).mean()}
    total = model.new_zeros(())
    sums: dict[str, Tensor] = {}
    start = 0
    for count in rows:
        part = slice(start, start + count)
        start += count
        own = mask[0, part].clone()
        own[..., (1 - group.rank()) % group.size() :: group.size()] &= group.size() == 1
        numbers = torch.arange(count)[:, None].expand(own.shape)[own]
        targets = mask[0, part].sum(-1)
        references = {"reference": reference[0, part].sum(-1)}
        labels = good[part].float()
        sequences = Sequences(numbers, targets, group, references, means, labels)
        of_all = objective.divisors([[1] * number for number in rows])
        divisors = {unit: torch.tensor(number) for unit, number in of_all.items()}
        loss = objective.loss({"logprob": model[0, part][own]}, sequences, divisors)
        total = total + loss.sum
        for name, row in loss.metrics.items():
            sums[name] = sums.get(name, torch.zeros(2)) + torch.stack(row)
    total.backward()
    assert model.grad is not None
    dist.all_reduce(model.grad)
    for value in sums.values():
        dist.all_reduce(value)
    return total.item(), model.grad, sums


def found_of_all(up: float) -> list[tuple[float, Tensor, dict[str, Tensor]]]:
    """What is found in each of ``ROWS``; a rank function."""
    return [found(LOSS, rows, up) for rows in ROWS]


@pytest.mark.parametrize("up", [0.3, -0.5])
@pytest.mark.parametrize("world", [1, 2])
def test_value_and_gradient_are_trl_s(world: int, up: float) -> None:
    """With an estimate of the divergence above zero, and with one that is cut off there."""
    model, reference, mask, good = problem()
    model.requires_grad_()
    theirs, kl = trl_losses.kto(
        LOSS.beta, LOSS.good_weight, LOSS.bad_weight, good, mask,
        torch.stack([model[0], model[1] + up * mask[1]]), reference,
    )  # fmt: skip
    theirs.backward()
    assert model.grad is not None and model.grad[1].abs().max() == 0
    assert (kl > 0.1) == (up > 0)
    for of_rank in run_ranks(found_of_all, world, up):
        for loss, gradient, sums in of_rank:
            assert loss == pytest.approx(theirs.item(), abs=1e-14)
            torch.testing.assert_close(gradient[mask], model.grad[mask], rtol=0, atol=1e-14)
            total, count = sums["kl"]
            assert (total / count).item() == pytest.approx(kl, rel=1e-6) and count == N
    assert model.grad[0].abs().max() > 1e-3


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_reported(world: int) -> None:
    model, reference, _, good = problem()
    rewards = LOSS.beta * (model - reference)[0].sum(-1)
    for loss, _, sums in run_ranks(found_of_all, world, 0.3)[0]:
        assert list(sums) == list(LOSS.metrics)
        assert [sums[name][1].item() for name in sums] == [N, N, 3, 2]
        means = {name: (total / count).item() for name, (total, count) in sums.items()}
        assert means["loss"] == pytest.approx(loss, rel=1e-6)
        assert means["good_reward"] == pytest.approx(rewards[good].mean().item(), rel=1e-6)
        assert means["bad_reward"] == pytest.approx(rewards[~good].mean().item(), rel=1e-6)


def test_three_passes_come_first() -> None:
    """The reference reads the samples; it and the model read mismatched sequences."""
    assert [reference.model for reference in LOSS.references] == ["base", "base", "current"]
    of_start = KTO(reference="start").references
    assert [reference.model for reference in of_start] == ["start", "start", "current"]
    assert [reference.mismatched for reference in of_start] == [False, True, True]
