"""The loss of distillation against TRL's own divergence and torch's ``kl_div`` in float64, with the
vocabulary divided over ranks and a batch over microbatches."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalora.model.divergence import Divergence, distance_from, distance_from_top, top_of
from megalora.model.head import Head
from megalora.objectives.distill import DISTANCE, Distill
from tests.distributed.ranks import run_ranks
from tests.objectives import trl_losses

# Tokens of the two microbatches, hidden sizes of both models, vocabulary, rank of an adapter.
SIZES = (7, 16)
H = 12
H_TEACHER = 20
V = 44
R = 3
OBJECTIVES = (
    Distill(),
    Distill(Divergence("forward", temperature=2.5), sft_weight=0.3),
    Distill(Divergence("reverse", temperature=0.7)),
    Distill(Divergence("jsd", beta=0.2, temperature=1.5), sft_weight=0.1),
)
CASES = tuple(product(OBJECTIVES, (False, True)))
"""Each of them without and with an adapter of the head."""
TRL_BETA = {"forward": 0.0, "reverse": 1.0}


def problem() -> tuple[Tensor, ...]:
    """x, W, the teacher's x and W, labels, the adapter's A and B, whole, in float64."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(SIZES)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    labels = torch.randint(V, (num_tokens,), generator=generator)
    # Logits of about 2, so that temperatures change more than a little.
    student = normal(num_tokens, H), 0.6 * normal(V, H)
    teacher = normal(num_tokens, H_TEACHER), 0.4 * normal(V, H_TEACHER)
    return *student, *teacher, labels, normal(R, H), 0.3 * normal(V, R)


def plain(objective: Distill, with_adapter: bool) -> dict[str, Any]:
    """Loss, divergence, and gradients of x and B, of all tokens at once by TRL and torch alone."""
    x, weight, x_teacher, w_teacher, labels, a, b = problem()
    x.requires_grad_()
    b.requires_grad_()
    logits = x @ (weight + b @ a).t() if with_adapter else x @ weight.t()
    of = objective.divergence
    beta = TRL_BETA.get(of.kind, of.beta)
    distance = trl_losses.gkd(logits, x_teacher @ w_teacher.t(), beta, of.temperature)
    # TRL's is not multiplied by the square of the temperature.
    loss = of.temperature**2 * distance + objective.sft_weight * F.cross_entropy(logits, labels)
    loss.backward()
    return {
        "loss": loss.item(),
        "divergence": distance.item(),
        "cross_entropy": F.cross_entropy(logits, labels).item(),
        "x": x.grad,
        "b": b.grad,
    }


def ours(objective: Distill, with_adapter: bool) -> dict[str, Any]:
    """The same over two microbatches on this rank of the world; its part of B's gradient."""
    group: Any = dist.group.WORLD
    x, weight, x_teacher, w_teacher, labels, a, b = problem()
    own = slice(group.rank() * V // group.size(), (group.rank() + 1) * V // group.size())
    x.requires_grad_()
    b.requires_grad_()
    # Room for five tokens: several chunks in a microbatch, the last one shorter.
    adapter = b[own] if with_adapter else None
    head = Head(weight[own], group, adapter, chunk_bytes=5 * (V // group.size()) * 40)
    counts = objective.divisors([[size] for size in SIZES])
    divisors = {"tokens": torch.tensor(counts["tokens"])}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in objective.metrics}
    for part in (slice(0, SIZES[0]), slice(SIZES[0], None)):
        reader = distance_from(objective.divergence, x_teacher[part], w_teacher[own])
        h = x[part] @ a.t() if with_adapter else None
        want = {**objective.want, DISTANCE: reader}
        loss = objective.loss(head(x[part], labels[part], want, h), None, divisors)
        loss.sum.backward()
        for name, of_part in loss.metrics.items():
            sums[name] += torch.stack(of_part)
    # Gradients of x are parts of a sum over ranks.
    dist.all_reduce(x.grad)
    found: dict[str, Any] = {name: (total / n).item() for name, (total, n) in sums.items()}
    return {**found, "x": x.grad, "b": b.grad[own] if with_adapter else None}


def every_loss() -> list[dict[str, Any]]:
    """``ours`` of each of ``CASES``; a rank function."""
    return [ours(*case) for case in CASES]


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_values_and_gradients_are_trl_s(world: int) -> None:
    for case, *ranks in zip(CASES, *run_ranks(every_loss, world), strict=True):
        expected = plain(*case)
        assert expected["divergence"] > 0.05
        for found in ranks:
            for name in case[0].metrics:
                assert found[name] == pytest.approx(expected[name], rel=1e-12), name
            torch.testing.assert_close(found["x"], expected["x"], rtol=1e-10, atol=1e-14)
        if case[1]:
            b = torch.cat([found["b"] for found in ranks])
            torch.testing.assert_close(b, expected["b"], rtol=1e-10, atol=1e-14)


def coarse(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the given tokens and of all others together, by hand."""
    listed = logprobs.exp().gather(1, ids)
    others = logprobs.exp().scatter(1, ids, 0.0).sum(1, keepdim=True)
    return torch.cat([listed, others], 1)


def of_top(kind: str, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(distances, gradient of x) of a student from a teacher's most probable tokens; a rank
    function."""
    group: Any = dist.group.WORLD
    x, weight, x_teacher, w_teacher, labels, *_ = problem()
    own = slice(group.rank() * V // group.size(), (group.rank() + 1) * V // group.size())
    room = 5 * (V // group.size()) * 40
    taught = Head(w_teacher[own], group, chunk_bytes=room)(
        x_teacher, labels, {"top": top_of(k, temperature)}
    )
    logprobs, ids, rest = taught["top"]
    reader = distance_from_top(Divergence(kind, 0.2, temperature), ids, logprobs, rest)
    x.requires_grad_()
    found = Head(weight[own], group, chunk_bytes=room)(x, labels, {"distance": reader})
    (found["distance"] * torch.arange(1, len(x) + 1)).sum().backward()
    dist.all_reduce(x.grad)
    assert x.grad is not None
    return found["distance"].detach(), x.grad


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_most_probable_tokens_and_the_rest(kind: str, world: int) -> None:
    k, temperature = 5, 1.5
    x, weight, x_teacher, w_teacher, *_ = problem()
    x.requires_grad_()
    teacher = (x_teacher @ w_teacher.t() / temperature).log_softmax(-1)
    student = (x @ weight.t() / temperature).log_softmax(-1)
    ids = teacher.topk(k).indices
    p, q = coarse(teacher, ids).log(), coarse(student, ids).log()
    beta = TRL_BETA.get(kind, 0.2)
    # TRL's of logarithms of probabilities, which its softmax leaves as they are.
    distances = []
    for place in range(len(x)):
        distances.append(trl_losses.gkd(q[place : place + 1], p[place : place + 1], beta, 1.0))
    expected = torch.stack(distances)
    (expected * torch.arange(1, len(x) + 1)).sum().backward()
    for found, gradient in run_ranks(of_top, world, kind, k, temperature):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(gradient, x.grad, rtol=1e-10, atol=1e-13)


def test_all_tokens_but_one_are_the_whole_distribution() -> None:
    ((found, _),) = run_ranks(of_top, 1, "reverse", V - 1, 2.0)
    x, weight, x_teacher, w_teacher, *_ = problem()
    whole = trl_losses.gkd(x @ weight.t(), x_teacher @ w_teacher.t(), 1.0, 2.0)
    assert found.mean().item() == pytest.approx(whole.item(), rel=1e-10)
    # What is not told apart is no farther.
    ((fewer, _),) = run_ranks(of_top, 1, "reverse", 3, 2.0)
    assert (fewer < found).all()


def test_distances_of_known_distributions() -> None:
    """Written out by hand: which of the two is the teacher shows in the direction."""
    student = torch.tensor([0.5, 0.5]).log()
    teacher = torch.tensor([0.9, 0.1]).log()
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert Divergence("forward").of_part(student, teacher).item() == pytest.approx(forward)
    assert Divergence("reverse").of_part(student, teacher).item() == pytest.approx(reverse)
    # m = 0.25 teacher + 0.75 student = (0.6, 0.4)
    of_teacher = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    of_student = 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4)
    mixed = Divergence("jsd", beta=0.25).of_part(student, teacher).item()
    assert mixed == pytest.approx(0.25 * of_teacher + 0.75 * of_student)


def test_a_teacher_alike_is_no_distance_away() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    for kind in ("forward", "reverse", "jsd"):
        of = Divergence(kind)
        assert of.of_part(logprobs, logprobs).abs().max() < 1e-15
        # A token is learned from the teacher's distribution at its own place, and no other.
        assert of.of_part(logprobs, logprobs.roll(1, 0)).min() > 0.03
