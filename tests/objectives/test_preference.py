"""Preference losses against TRL's own, value and gradient in float64, over any division into rows;
what is reported against the definitions."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalora.objectives.objective import Sequences
from megalora.objectives.preference import KINDS, Preference
from tests.distributed.ranks import run_ranks
from tests.objectives import trl_losses

P = 5
S = 9
CASES = {
    "sigmoid": Preference("sigmoid", beta=0.3),
    "robust": Preference("robust", beta=0.3, label_smoothing=0.2),
    "hinge": Preference("hinge", beta=0.3),
    "ipo": Preference("ipo", beta=0.3),
    "sigmoid and sft": Preference("sigmoid", beta=0.3, sft_weight=0.7),
    "simpo": Preference("simpo", beta=2.0, margin=0.4),
    "simpo, smoothed": Preference("simpo", beta=2.0, margin=0.4, label_smoothing=0.1),
    "orpo": Preference("orpo", beta=0.2),
}
ROWS = ([5], [2, 3], [1, 1, 0, 3])
"""Pairs of each row; a row without any is filler."""


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of model and reference ``[P, 2, S]`` and which are of target tokens: the
    two of a pair, and pairs among themselves, differ in length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, S, (P, 2), generator=generator)
    mask = torch.arange(S) < lengths[..., None]
    assert len(lengths.unique()) > 3 and (lengths[:, 0] != lengths[:, 1]).any()
    model = -torch.rand(P, 2, S, generator=generator).double() * 2 * mask
    reference = -torch.rand(P, 2, S, generator=generator).double() * 2 * mask
    return model, reference, mask


def theirs(objective: Preference, model: Tensor) -> Tensor:
    """The loss by TRL."""
    _, reference, mask = problem()
    # TRL has all chosen answers before all rejected ones.
    by_side = [part.transpose(0, 1).flatten(0, 1) for part in (model, reference, mask)]
    means = (model.sum(-1) / mask.sum(-1)).unbind(1)
    options = objective
    if objective.kind == "simpo":
        return trl_losses.simpo(
            options.beta, options.margin, options.label_smoothing, *means
        ).mean()
    if objective.kind == "orpo":
        return trl_losses.orpo(options.beta, *means).mean()
    return trl_losses.dpo(
        objective.kind, options.beta, options.label_smoothing, *by_side, options.sft_weight
    )


def ours(objective: Preference, model: Tensor, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, what is reported) of the pairs in rows of so many, of whose tokens this rank of the
    world has every other one."""
    _, reference, mask = problem()
    group: Any = dist.group.WORLD
    targets = [mask[first : first + count].sum(-1).flatten() for first, count in _bounds(rows)]
    divisors = objective.divisors([of_row.tolist() for of_row in targets])
    total = model.new_zeros(())
    sums: dict[str, Tensor] = {}
    for (first, count), of_row in zip(_bounds(rows), targets, strict=True):
        part = slice(first, first + count)
        own = mask[part].clone()
        own[..., (1 - group.rank()) % group.size() :: group.size()] &= group.size() == 1
        numbers = torch.arange(2 * count).view(count, 2, 1).expand(own.shape)[own]
        references = {"reference": reference[part].sum(-1).flatten()}
        sequences = Sequences(numbers, of_row, group, references)
        of_all = {unit: torch.tensor(number) for unit, number in divisors.items()}
        loss = objective.loss({"logprob": model[part][own]}, sequences, of_all)
        total = total + loss.sum
        for name, row in loss.metrics.items():
            sums[name] = sums.get(name, torch.zeros(2)) + torch.stack(row)
    return total, sums


def _bounds(rows: list[int]) -> list[tuple[int, int]]:
    """(first pair, number of pairs) of each row."""
    return [(sum(rows[:at]), count) for at, count in enumerate(rows)]


def found(objective: Preference, rows: list[int]) -> tuple[float, Tensor, dict[str, Tensor]]:
    """(loss, gradient, metrics) over all ranks; a rank function."""
    model = problem()[0].requires_grad_()
    loss, sums = ours(objective, model, rows)
    loss.backward()
    assert model.grad is not None
    dist.all_reduce(model.grad)
    for value in sums.values():
        dist.all_reduce(value)
    return loss.item(), model.grad, sums


def found_of_all() -> list[list[tuple[float, Tensor, dict[str, Tensor]]]]:
    """For each of ``CASES``, what is found in each of ``ROWS``; a rank function."""
    return [[found(objective, rows) for rows in ROWS] for objective in CASES.values()]


@pytest.mark.parametrize("world", [1, 2])
def test_value_and_gradient_are_trl_s(world: int) -> None:
    of_ranks = run_ranks(found_of_all, world)
    for number, (name, objective) in enumerate(CASES.items()):
        model, _, mask = problem()
        model.requires_grad_()
        expected = theirs(objective, model)
        expected.backward()
        assert model.grad is not None
        assert model.grad[mask].abs().max() > 1e-3, name
        # ORPO's loss in TRL is float32.
        limit = 1e-7 if objective.kind == "orpo" else 1e-14
        for of_cases in of_ranks:
            for loss, gradient, _ in of_cases[number]:
                assert loss == pytest.approx(expected.item(), abs=limit), name
                torch.testing.assert_close(
                    gradient[mask], model.grad[mask], rtol=0, atol=limit, msg=name
                )


def test_every_kind_is_another_loss() -> None:
    """A name that computed another one's loss would pass for it."""
    model, _, mask = problem()
    del mask
    losses = set()
    for objective in CASES.values():
        losses.add(round(theirs(objective, model).item(), 6))
    assert len(losses) == len(CASES)
    assert {objective.kind for objective in CASES.values()} == KINDS.keys()


def test_label_smoothing_of_dpo_is_a_mixture_of_both_orders() -> None:
    """TRL's sigmoid takes no notice of label smoothing: conservative DPO by its definition."""
    model, reference, mask = problem()
    plain = trl_losses_of(model, reference, mask)
    swapped = trl_losses_of(model.flip(1), reference.flip(1), mask.flip(1))
    objective = Preference("sigmoid", beta=0.3, label_smoothing=0.2)
    ((loss, _, _),) = run_ranks(found, 1, objective, [P])
    assert loss == pytest.approx(0.8 * plain + 0.2 * swapped, abs=1e-14)


def trl_losses_of(model: Tensor, reference: Tensor, mask: Tensor) -> float:
    parts = [part.transpose(0, 1).flatten(0, 1) for part in (model, reference, mask)]
    return trl_losses.dpo("sigmoid", 0.3, 0.0, *parts).item()


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_reported(world: int) -> None:
    """Means over all pairs, however they share rows, by their definitions."""
    model, reference, mask = problem()
    gained = (model - reference).sum(-1)
    tokens = mask.sum(-1)
    for rows in ROWS:
        objective = CASES["sigmoid and sft"]
        loss, _, sums = run_ranks(found, world, objective, rows)[0]
        means = {name: (total / count).item() for name, (total, count) in sums.items()}
        assert list(sums) == list(objective.metrics)
        assert sums["loss"][1] == P and sums["chosen_cross_entropy"][1] == tokens[:, 0].sum()
        assert means["loss"] == pytest.approx(loss, rel=1e-6)
        assert means["accuracy"] == (gained[:, 0] > gained[:, 1]).double().mean()
        margin = 0.3 * (gained[:, 0] - gained[:, 1]).mean().item()
        assert means["margin"] == pytest.approx(margin, rel=1e-6)
        assert means["chosen_reward"] == pytest.approx(0.3 * gained[:, 0].mean().item(), rel=1e-6)
        difference = means["chosen_reward"] - means["rejected_reward"]
        assert difference == pytest.approx(margin, rel=1e-5)
        cross_entropy = -model[:, 0].sum().item() / tokens[:, 0].sum().item()
        assert means["chosen_cross_entropy"] == pytest.approx(cross_entropy, rel=1e-6)


def test_certain_answers_have_a_loss_and_a_gradient() -> None:
    """Log-probabilities of exactly zero, as float32 has them where the model is sure."""
    group_of_one = run_ranks(orpo_of_zeros, 1)[0]
    loss, gradient = group_of_one
    assert math.isfinite(loss) and gradient.isfinite().all()
    # The rejected answer's still falls.
    assert gradient[2:].abs().min() > 0


def orpo_of_zeros() -> tuple[float, Tensor]:
    """A rank function: loss and gradient of two chosen tokens that are certain and two rejected
    ones that are not."""
    logprobs = torch.tensor([0.0, 0.0, -1.0, -2.0]).requires_grad_()
    group: Any = dist.group.WORLD
    sequences = Sequences(torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2]), group)
    one = {unit: torch.tensor(1.0) for unit in ("pairs", "chosen_tokens")}
    loss = CASES["orpo"].loss({"logprob": logprobs}, sequences, one)
    loss.sum.backward()
    assert logprobs.grad is not None
    return loss.sum.item(), logprobs.grad


def test_rewards_without_a_reference_are_means() -> None:
    model, _, mask = problem()
    ((_, _, sums),) = run_ranks(found, 1, CASES["simpo"], [2, 3])
    means = 2.0 * model.sum(-1) / mask.sum(-1)
    total, count = sums["chosen_reward"]
    assert (total / count).item() == pytest.approx(means[:, 0].mean().item(), rel=1e-6)
