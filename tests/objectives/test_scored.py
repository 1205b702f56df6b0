"""Losses of a score head against transformers' and TRL's own, value and gradient in float64, over
any division into rows and over ranks that share them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from megalora.objectives.objective import Objective, Sequences
from megalora.objectives.scored import Classify, Reward
from tests.distributed.ranks import run_ranks
from tests.objectives import trl_losses

Q = 10
"""Sequences, or twice the pairs."""
CASES: dict[str, tuple[Any, int]] = {
    "labels": (Classify(4), 4),
    "a value": (Classify(1), 1),
    "reward": (Reward(), 1),
    "reward, centred": (Reward(centre=0.3), 1),
}
"""Objective, and its number of scores."""
ROWS = ([10], [4, 6], [2, 2, 0, 6])
"""Sequences of each row; a row without any is filler."""


def problem(name: str) -> tuple[Tensor, Tensor]:
    """Scores ``[Q, C]`` and what they are compared with ``[Q]``."""
    objective, num_scores = CASES[name]
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(Q, num_scores, generator=generator, dtype=torch.float64)
    if num_scores > 1:
        return scores, torch.randint(num_scores, (Q,), generator=generator).double()
    values = torch.rand(Q, generator=generator, dtype=torch.float64).float().double()
    if isinstance(objective, Reward):
        # Both sequences of a pair have its margin.
        values = values[::2].repeat_interleave(2)
    return scores, values


def theirs(name: str, scores: Tensor) -> Tensor:
    """The loss by transformers or TRL."""
    objective, num_scores = CASES[name]
    _, values = problem(name)
    if isinstance(objective, Reward):
        by_side = torch.cat([scores[::2], scores[1::2]])
        return trl_losses.reward(by_side, values[::2], objective.centre or None)
    config = SimpleNamespace(problem_type=None, num_labels=num_scores)
    labels = values.long() if num_scores > 1 else values
    return ForSequenceClassificationLoss(labels, scores, config)


def found(name: str, rows: list[int]) -> tuple[float, Tensor, dict[str, Tensor]]:
    """(loss, gradient, metrics) over all ranks, each of which has every other sequence's score; a
    rank function."""
    objective: Objective = CASES[name][0]
    scores, values = problem(name)
    scores.requires_grad_()
    group: Any = dist.group.WORLD
    divisors = objective.divisors([[1] * count for count in rows])
    of_all = {unit: torch.tensor(float(number)) for unit, number in divisors.items()}
    total = torch.zeros((), dtype=torch.float64)
    sums: dict[str, Tensor] = {}
    first = 0
    for count in rows:
        numbers = torch.arange(count)[group.rank() :: group.size()]
        of_row = torch.ones(count, dtype=torch.int64)
        here = values[first : first + count]
        sequences = Sequences(numbers, of_row, group, values=here)
        loss = objective.loss({"scores": scores[first + numbers]}, sequences, of_all)
        total = total + loss.sum
        for metric, row in loss.metrics.items():
            sums[metric] = sums.get(metric, torch.zeros(2)) + torch.stack(row)
        first += count
    total.backward()
    assert scores.grad is not None
    dist.all_reduce(scores.grad)
    for value in sums.values():
        dist.all_reduce(value)
    return total.item(), scores.grad, sums


def found_of_all() -> list[list[tuple[float, Tensor, dict[str, Tensor]]]]:
    return [[found(name, rows) for rows in ROWS] for name in CASES]


@pytest.mark.parametrize("world", [1, 2])
def test_value_and_gradient_are_those_of_transformers_and_trl(world: int) -> None:
    of_ranks = run_ranks(found_of_all, world)
    for number, (name, (objective, _)) in enumerate(CASES.items()):
        scores, values = problem(name)
        scores.requires_grad_()
        expected = theirs(name, scores)
        expected.backward()
        assert scores.grad is not None and scores.grad.abs().max() > 1e-3
        for place in range(len(ROWS)):
            answers = [of_rank[number][place] for of_rank in of_ranks]
            _, gradient, sums = answers[0]
            assert (gradient - scores.grad).abs().max() < 1e-12, name
            # Both sides of a pair are on one rank or two, but its loss counts once.
            total, count = sums["loss"].tolist()
            assert total / count == pytest.approx(expected.item(), rel=1e-6)
            assert count == (Q // 2 if isinstance(objective, Reward) else Q)
            if "accuracy" in sums:
                right, count = sums["accuracy"].tolist()
                plain = scores.detach()
                if isinstance(objective, Reward):
                    is_right = plain[::2, 0] > plain[1::2, 0]
                else:
                    is_right = plain.argmax(1) == values.long()
                assert 0 < right < count
                assert right / count == pytest.approx(is_right.double().mean().item())
