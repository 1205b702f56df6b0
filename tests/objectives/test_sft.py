"""The loss of supervised fine-tuning against torch's own cross entropy in float64, with the
vocabulary divided over ranks and a batch over microbatches."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalora.model.head import Head
from megalora.objectives.sft import SFT
from tests.distributed.ranks import run_ranks

# Tokens of the two microbatches, hidden size, vocabulary and rank of an adapter.
SIZES = (7, 16)
H = 12
V = 44
R = 3
OPTIONS = (
    SFT(),
    SFT(z_loss=0.01),
    SFT(label_smoothing=0.2),
    SFT(z_loss=0.01, label_smoothing=0.2),
)


def problem() -> tuple[Tensor, ...]:
    """x, W, labels, mask and the adapter's A and B, whole, in float64. Of the first microbatch few
    tokens are targets, of the second most."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(SIZES)
    x = torch.randn(num_tokens, H, generator=generator, dtype=torch.float64)
    # Logits of about 3, so that their squares are no rounding beside the loss.
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (num_tokens,), generator=generator)
    mask = (torch.arange(num_tokens) % 3 != 0).float()
    mask[: SIZES[0]] = 0.0
    mask[2] = 1.0
    a = torch.randn(R, H, generator=generator, dtype=torch.float64)
    b = torch.randn(V, R, generator=generator, dtype=torch.float64)
    return x, weight, labels, mask, a, b


def plain(objective: SFT, with_adapter: bool) -> tuple[float, float, Tensor]:
    """(loss, cross entropy, gradient of x) of all tokens at once by torch alone."""
    x, weight, labels, mask, a, b = problem()
    x.requires_grad_()
    logits = (x @ (weight + b @ a).t() if with_adapter else x @ weight.t())[mask > 0]
    targets = labels[mask > 0]
    loss = F.cross_entropy(logits, targets, label_smoothing=objective.label_smoothing)
    loss = loss + objective.z_loss * logits.logsumexp(-1).square().mean()
    loss.backward()
    assert x.grad is not None
    return loss.item(), F.cross_entropy(logits, targets).item(), x.grad


def ours(objective: SFT, with_adapter: bool) -> tuple[float, float, Tensor]:
    """The same over two microbatches on this rank of the world."""
    group: Any = dist.group.WORLD
    x, weight, labels, mask, a, b = problem()
    own = slice(group.rank() * V // group.size(), (group.rank() + 1) * V // group.size())
    # Room for five tokens: several chunks in a microbatch, the last one shorter.
    head = Head(weight[own], group, b[own] if with_adapter else None, chunk_bytes=5 * V * 16)
    x.requires_grad_()
    masks = mask.split(SIZES)
    targets = [[int(part.sum())] for part in masks]
    divisors = {"tokens": torch.tensor(objective.divisors(targets)["tokens"])}
    # What is reported in training, and what in evaluation.
    names = (objective.metrics[0], objective.evaluated[0])
    sums = [torch.zeros(2), torch.zeros(2)]
    start = 0
    for part in masks:
        places = part.nonzero()[:, 0]
        mine = x[start + places]
        h = mine @ a.t() if with_adapter else None
        outputs = head(mine, labels[start + places], objective.want, h)
        loss = objective.loss(outputs, None, divisors)
        loss.sum.backward()
        assert set(objective.metrics) <= loss.metrics.keys()
        for name, total in zip(names, sums, strict=True):
            total += torch.stack(loss.metrics[name])
        start += len(part)
    assert x.grad is not None
    gradient = x.grad.contiguous()
    dist.all_reduce(gradient)
    means = [(total / count).item() for total, count in sums]
    return means[0], means[1], gradient


def deviations(objective: SFT) -> list[float]:
    """Of loss, cross entropy and gradient from torch's, on every path; a rank function."""
    found = []
    for with_adapter in (False, True):
        expected = plain(objective, with_adapter)
        result = ours(objective, with_adapter)
        found.append(abs(result[0] - expected[0]) / abs(expected[0]))
        found.append(abs(result[1] - expected[1]) / abs(expected[1]))
        size = expected[2].abs().max()
        found.append(((result[2] - expected[2]).abs().max() / size).item())
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("objective", OPTIONS, ids=str)
def test_loss_and_gradient_are_torch_s(objective: SFT, world: int) -> None:
    for found in run_ranks(deviations, world, objective):
        assert len(found) == 6
        # Float64 throughout, but for metrics that are added up in float32.
        assert max(found) < 1e-6
        assert max(found[2::3]) < 1e-14


def test_the_options_change_the_loss_and_not_what_is_evaluated() -> None:
    losses = set()
    evaluated = set()
    for objective in OPTIONS:
        loss, cross_entropy, _ = plain(objective, with_adapter=False)
        losses.add(round(loss, 6))
        evaluated.add(cross_entropy)
    # What the test above compares with differs by option.
    assert len(losses) == 4 and len(evaluated) == 1
    assert [objective.metrics for objective in OPTIONS] == [
        ("loss",),
        ("loss", "cross_entropy", "z_loss"),
        ("loss", "cross_entropy"),
        ("loss", "cross_entropy", "z_loss"),
    ]
    # The mean logit costs a pass over the logits, which only smoothing pays for.
    assert [list(objective.want) for objective in OPTIONS] == [
        ["logprob"],
        ["logprob", "logsumexp"],
        ["logprob", "logsumexp", "mean_logit"],
        ["logprob", "logsumexp", "mean_logit"],
    ]
