"""Policy losses against TRL's own, value and gradient in float64, over any division into rows and
over context parallelism; those that TRL lacks against loops written from the papers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from trl.trainer.utils import selective_log_softmax_and_entropy

from megalora.config.policy import PolicyConfig
from megalora.model.head import Head
from megalora.objectives.objective import Sequences
from megalora.objectives.policy import Policy
from tests.distributed.ranks import run_ranks
from tests.objectives import trl_policy

N = 5
T = 9
ROWS = ([5], [2, 3], [1, 0, 1, 3])
"""Sequences of each row; a row without any is filler."""
ATOL = 1e-12


def problem() -> dict[str, Tensor]:
    """``[N, T]`` log-probabilities, of which ``mask`` says the learned ones: the fourth sequence
    has a tool's tokens in its middle. Advantages of both signs, and ratios on both sides of any
    clip."""
    generator = torch.Generator().manual_seed(4)

    def drawn(scale: float) -> Tensor:
        return scale * torch.randn(N, T, generator=generator).double()

    mask = torch.arange(T) < torch.tensor([9, 4, 1, 7, 9])[:, None]
    mask[3, 2:4] = False
    model = -torch.rand(N, T, generator=generator).double() * 3
    old = model + drawn(0.5)
    engine = model + drawn(0.4)
    # A sequence with a good advantage that the engine finds likelier, too.
    engine[1] += 0.4
    return {
        "mask": mask, "model": model, "old": old, "engine": engine,
        "reference": model + drawn(0.3), "entropy": torch.rand(N, T, generator=generator).double(),
        "advantages": torch.tensor([-1.2, 0.7, -0.4, 1.5, -2.0]).double(),
        "by token": drawn(1.0),
    }  # fmt: skip


def found(
    options: PolicyConfig, rows: list[int], by_token: bool = False
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """(loss, gradients, metrics) of the sequences in rows of so many, of whose tokens this rank of
    the world has every other one; a rank function."""
    objective = Policy(options)
    given = problem()
    model = given["model"].requires_grad_()
    entropy = given["entropy"].requires_grad_()
    group: Any = dist.group.WORLD
    mask = given["mask"]
    of_all = objective.divisors([[int(n) for n in mask.sum(1)]])
    divisors = {unit: torch.tensor(number).double() for unit, number in of_all.items()}
    assert of_all == {"tokens": int(mask.sum()), "sequences": N}
    total = model.new_zeros(())
    sums: dict[str, Tensor] = {}
    start = 0
    for count in rows:
        part = slice(start, start + count)
        start += count
        own = mask[part].clone()
        own[:, (1 - group.rank()) % group.size() :: group.size()] &= group.size() == 1
        numbers = torch.arange(count)[:, None].expand(own.shape)[own]
        columns = {
            "logprobs": given["engine"][part][own],
            "proximal_logprobs": given["old"][part][own],
            "start": given["old"][part][own],
            "base": given["reference"][part][own],
        }
        if by_token:
            columns["advantages"] = given["by token"][part][own]
        sequences = Sequences(
            numbers, mask[part].sum(1), group, {}, {}, given["advantages"][part], columns
        )
        outputs = {"logprob": model[part][own], "entropy": entropy[part][own]}
        loss = objective.loss(outputs, sequences, divisors)
        total = total + loss.sum
        assert list(loss.metrics) == list(objective.metrics)
        for name, row in loss.metrics.items():
            before = sums.get(name, torch.zeros(2).double())
            values = torch.stack(row).double()
            sums[name] = torch.maximum(before, values) if "_max" in name else before + values
    total.backward()
    gradients = {"model": model.grad, "entropy": entropy.grad}
    for name, gradient in gradients.items():
        gradients[name] = torch.zeros_like(model) if gradient is None else gradient
        dist.all_reduce(gradients[name])
    for name, value in sums.items():
        dist.all_reduce(value, op=dist.ReduceOp.MAX if "_max" in name else dist.ReduceOp.SUM)
    whole = total.detach()
    dist.all_reduce(whole)
    return whole.item(), gradients, sums  # pyright: ignore[reportReturnType]


def found_of_all(cases: list[tuple[PolicyConfig, bool]]) -> list[list[Any]]:
    """What is found of each case in each of ``ROWS``; a rank function."""
    return [[found(options, rows, by_token) for rows in ROWS] for options, by_token in cases]


def weights_of(level: str, action: str, lower: float, upper: float) -> Tensor:
    """``[N, T]`` weights by their definition, sequence by sequence."""
    given = problem()
    weights = torch.ones(N, T).double()
    for n in range(N):
        places = given["mask"][n].nonzero().flatten().tolist()
        gaps = [(given["old"][n, t] - given["engine"][n, t]).item() for t in places]
        for t, gap in zip(places, gaps, strict=True):
            if level == "sequence":
                gap = sum(gaps)
            if level == "geometric":
                gap = sum(gaps) / len(gaps)
            weight = math.exp(gap)
            if action == "truncate":
                weight = min(max(weight, lower), upper)
            elif not lower <= weight <= upper:
                weight = 0.0
            weights[n, t] = weight
    return weights


Case = tuple[dict[str, Any], dict[str, Any], bool]
DATA = {"proximal": "data"}
TRL: dict[str, Case] = {
    "grpo": (DATA | {"reduction": "sequence"}, {"kind": "grpo"}, False),
    "dapo": (DATA | {"clip_high": 0.28}, {"kind": "dapo", "high": 0.28}, False),
    "bnpo": (DATA, {"kind": "bnpo"}, False),
    "dr_grpo": (
        DATA | {"reduction": "constant", "reduction_length": 11},
        {"kind": "dr_grpo", "max_length": 11},
        False,
    ),
    "advantages by token": (DATA, {"kind": "dapo"}, True),
    "two-sided": (DATA | {"ratio_cap": 1.3}, {"kind": "dapo", "delta": 1.3}, False),
    "gspo": (
        DATA | {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.1},
        {"kind": "grpo", "level": "sequence", "low": 0.05, "high": 0.1},
        False,
    ),
    "gspo by token": (
        DATA | {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.1},
        {"kind": "grpo", "level": "sequence", "low": 0.05, "high": 0.1},
        True,
    ),
    "luspo": (
        DATA | {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.1, "reduction": "sum"},
        {"kind": "luspo", "level": "sequence", "low": 0.05, "high": 0.1},
        False,
    ),
    "gmpo": (DATA | {"loss": "gmpo"}, {"kind": "gmpo", "low": 0.4, "high": 0.4}, False),
    "cispo": (DATA | {"loss": "cispo", "ratio_cap": 1.2}, {"kind": "cispo", "high": 1.2}, False),
    # TRL's temperatures are float32 there, which holds these.
    "sapo": (DATA | {"loss": "sapo", "sapo": [0.75, 1.25]}, {"kind": "sapo"}, False),
    "vespo": (DATA | {"loss": "vespo"}, {"kind": "vespo"}, False),
    "kl": (DATA | {"kl_coef": 0.1}, {"kind": "dapo", "beta": 0.1}, False),
    "kl corrected": (
        DATA | {"kl_coef": 0.1, "kl_corrected": True},
        {"kind": "dapo", "beta": 0.1, "corrected": True},
        False,
    ),
    "gspo, kl corrected": (
        DATA | {"loss": "gspo", "kl_coef": 0.1, "kl_corrected": True},
        {"kind": "grpo", "level": "sequence", "low": 3e-4, "high": 4e-4, "beta": 0.1,
         "corrected": True},
        False,
    ),
    "gmpo, kl": (
        DATA | {"loss": "gmpo", "kl_coef": 0.1},
        {"kind": "gmpo", "low": 0.4, "high": 0.4, "beta": 0.1},
        False,
    ),
    "entropy": (DATA | {"entropy_coef": 0.02}, {"kind": "dapo", "entropy_coef": 0.02}, False),
    "off-policy sequences": (
        DATA | {"drop_divergence": 0.05}, {"kind": "dapo", "threshold": 0.05}, False,
    ),
    "token truncate": (
        DATA | {"mismatch": "token", "mismatch_upper": 1.2},
        {"kind": "dapo", "weights": ("token", "truncate", 0.0, 1.2)},
        False,
    ),
    "token mask": (
        DATA | {"mismatch": "token", "mismatch_action": "mask", "mismatch_lower": 0.8,
                "mismatch_upper": 1.3},
        {"kind": "dapo", "weights": ("token", "mask", 0.8, 1.3)},
        False,
    ),
    "sequence truncate": (
        DATA | {"mismatch": "sequence", "mismatch_upper": 1.5},
        {"kind": "dapo", "weights": ("sequence", "truncate", 0.0, 1.5)},
        False,
    ),
    "sequence mask": (
        DATA | {"mismatch": "sequence", "mismatch_action": "mask", "mismatch_upper": 1.5},
        {"kind": "dapo", "weights": ("sequence", "mask", 0.0, 1.5)},
        False,
    ),
    "geometric mask, gspo": (
        DATA | {"loss": "gspo", "clip_low": 0.3, "clip_high": 0.3, "mismatch": "geometric",
                "mismatch_action": "mask", "mismatch_lower": 0.7, "mismatch_upper": 1.2},
        {"kind": "grpo", "level": "sequence", "low": 0.3, "high": 0.3,
         "weights": ("geometric", "mask", 0.7, 1.2)},
        False,
    ),
    "vespo, token": (
        DATA | {"loss": "vespo", "mismatch": "token", "mismatch_upper": 1.2},
        {"kind": "vespo", "weights": ("token", "truncate", 0.0, 1.2)},
        False,
    ),
}  # fmt: skip


def theirs(case: Case) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """(loss, gradients, what is logged) by TRL."""
    _, arguments, by_token = case
    given = problem()
    model = given["model"].requires_grad_()
    entropy = given["entropy"].requires_grad_()
    arguments = dict(arguments)
    if "weights" in arguments:
        arguments["weights"] = weights_of(*arguments["weights"])
    if "beta" in arguments:
        arguments["reference"] = given["reference"]
    if "threshold" in arguments:
        arguments["sampling"] = given["engine"]
    loss, logged = trl_policy.loss(
        model, given["old"], given["by token" if by_token else "advantages"],
        given["mask"].double(), entropies=entropy, **arguments,
    )  # fmt: skip
    loss.backward()
    zeros = torch.zeros_like(model)
    gradients = {"model": model.grad, "entropy": entropy.grad}
    return (
        loss.item(),
        {name: zeros if gradient is None else gradient for name, gradient in gradients.items()},
        logged,
    )


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_value_and_gradient_are_trl_s(world: int) -> None:
    cases = [(PolicyConfig(**options), by_token) for options, _, by_token in TRL.values()]
    mask = problem()["mask"]
    for of_rank in run_ranks(found_of_all, world, cases):
        for (name, case), of_rows in zip(TRL.items(), of_rank, strict=True):
            loss, gradients, _ = theirs(case)
            assert gradients["model"][mask].abs().max() > 1e-3, name
            for ours, our_gradients, _ in of_rows:
                assert ours == pytest.approx(loss, abs=ATOL), name
                for of, expected in gradients.items():
                    deviation = (our_gradients[of] - expected * mask).abs().max().item()
                    assert deviation <= ATOL, (name, of, deviation)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_reported(world: int) -> None:
    """What TRL logs too is what it logs; gaps by their definitions."""
    given = problem()
    mask = given["mask"]
    gap = (given["engine"] - given["model"])[mask]
    logged_by = {"clip_ratio/region_mean": "clipped_share", "kl": "kl", "entropy": "entropy"}
    names = ("dapo", "two-sided", "kl")
    cases = [(PolicyConfig(**TRL[name][0]), False) for name in names]
    for of_rank in run_ranks(found_of_all, world, cases):
        for name, of_rows in zip(names, of_rank, strict=True):
            loss, _, logged = theirs(TRL[name])
            for _, _, sums in of_rows:
                means = {key: (value[0] / value[1]).item() for key, value in sums.items()}
                assert means["loss"] == pytest.approx(loss, rel=1e-6)
                for key, own in logged_by.items():
                    if key in logged:
                        assert means[own] == pytest.approx(logged[key], rel=1e-6), key
                assert means["engine_gap"] == pytest.approx(gap.abs().mean().item(), rel=1e-6)
                k3 = (gap.exp() - gap - 1).mean().item()
                assert means["engine_k3"] == pytest.approx(k3, rel=1e-6)
                largest = gap.abs().max().item()
                assert means["engine_gap_max"] == pytest.approx(largest, rel=1e-6)
                # Without a correction there is no weight to report.
                assert sums["mismatch_weight"][1] == 0 and means["kept_share"] == 1
    assert theirs(TRL["dapo"])[2]["clip_ratio/region_mean"] > 0.1


def looped(term: Callable[[dict[str, Any]], Tensor]) -> tuple[float, Tensor]:
    """(loss, gradient) of the token mean of ``term``, token by token: l, old, engine, reference and
    a of one token each."""
    given = problem()
    model = given["model"].requires_grad_()
    total = model.new_zeros(())
    for n in range(N):
        for t in given["mask"][n].nonzero().flatten().tolist():
            of_token = {name: given[name][n, t] for name in ("old", "engine", "reference")}
            total = total + term({**of_token, "l": model[n, t], "a": given["advantages"][n].item()})
    total = total / int(given["mask"].sum())
    (gradient,) = torch.autograd.grad(total, model)
    return total.item(), gradient


def clipped(x: dict[str, Any], ratio: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    return -torch.min(ratio * x["a"], ratio.clamp(1 - low, 1 + high) * x["a"])


def dual(x: dict[str, Any]) -> Tensor:
    """Ye et al. 1912.09729, equation 5: for A < 0, max(min(r A, clip(r) A), c A)."""
    kept = -clipped(x, (x["l"] - x["old"]).exp())
    if x["a"] < 0 and kept.item() < 1.1 * x["a"]:
        return 0 * x["l"] - 1.1 * x["a"]
    return -kept


def dppo(x: dict[str, Any]) -> Tensor:
    """A token counts unless its probability has moved by more than 0.05 where the advantage
    pulls."""
    moved = x["l"].exp().item() - x["engine"].exp().item()
    if (x["a"] > 0 and moved > 0.05) or (x["a"] < 0 and moved < -0.05):
        return 0 * x["l"]
    return -(x["l"] - x["engine"]).exp() * x["a"]


def decoupled(x: dict[str, Any]) -> Tensor:
    """Hilton et al. 2110.00641, equation 3, with the weight of AReaL cut at 1.2."""
    weight = min((x["old"] - x["engine"]).exp().item(), 1.2)
    return weight * clipped(x, (x["l"] - x["old"]).exp())


LOOPS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Tensor]]] = {
    "dual clip": (DATA | {"dual_clip": 1.1}, dual),
    "dppo": ({"loss": "plain", "drop_gap": 0.05}, dppo),
    "engine": ({}, lambda x: clipped(x, (x["l"] - x["engine"]).exp())),
    "start": (
        {"proximal": "start", "mismatch": "token", "mismatch_upper": 1.2},
        decoupled,
    ),
    # The gradient of -A l, whatever the ratio was.
    "current": ({"proximal": "current"}, lambda x: -x["a"] * (x["l"] - x["l"].detach()).exp()),
    "k2": (
        {"proximal": "current", "kl_coef": 0.3, "kl": "k2"},
        lambda x: (
            -x["a"] * (x["l"] - x["l"].detach()).exp()
            + 0.3 * (x["l"] - x["reference"]).square() / 2
        ),
    ),
    "k1": (
        DATA | {"kl_coef": 0.3, "kl": "k1", "kl_corrected": True},
        lambda x: (
            clipped(x, (x["l"] - x["old"]).exp())
            + 0.3 * (x["l"] - x["old"]).exp() * (x["l"] - x["reference"])
        ),
    ),
}


def test_what_trl_lacks_is_what_the_papers_say() -> None:
    cases = [(PolicyConfig(**options), False) for options, _ in LOOPS.values()]
    (of_rank,) = run_ranks(found_of_all, 1, cases)
    for (name, (_, term)), of_rows in zip(LOOPS.items(), of_rank, strict=True):
        loss, gradient = looped(term)
        for ours, gradients, _ in of_rows:
            assert ours == pytest.approx(loss, abs=ATOL), name
            assert (gradients["model"] - gradient).abs().max().item() <= ATOL, name


def test_tokens_that_the_engine_did_not_score() -> None:
    """They have a ratio and a weight of 1, and no gap."""
    (of_rank,) = run_ranks(unscored, 1)
    # The other two tokens are each 0.1 nats less likely in the engine.
    for (gradient, sums), weight in zip(of_rank, (1.0, math.exp(0.2)), strict=True):
        # -A r w / 3 tokens
        assert gradient[1].item() == pytest.approx(-weight / 3) and gradient.isfinite().all()
        assert sums["engine_gap"][1] == 2 and sums["ratio"][1] == 3


def unscored() -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(gradient, metrics) of three tokens, of which one has no log-probability; a rank function."""
    found_of = []
    for options in (
        PolicyConfig(),
        PolicyConfig(proximal="current", mismatch="sequence", drop_divergence=9.0, drop_gap=0.9),
    ):
        model = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
        engine = torch.tensor([-1.1, float("nan"), -0.6])
        group: Any = dist.group.WORLD
        sequences = Sequences(
            torch.zeros(3, dtype=torch.long), torch.tensor([3]), group,
            values=torch.tensor([1.0]), columns={"logprobs": engine},
        )  # fmt: skip
        divisors = {"tokens": torch.tensor(3.0), "sequences": torch.tensor(1.0)}
        outputs = {"logprob": model, "entropy": torch.zeros(3)}
        loss = Policy(options).loss(outputs, sequences, divisors)
        loss.sum.backward()
        assert model.grad is not None
        metrics = {name: torch.stack(row) for name, row in loss.metrics.items()}
        found_of.append((model.grad, metrics))
    return found_of


def test_passes_and_readers_are_those_that_are_needed() -> None:
    def models(**options: Any) -> list[str]:
        policy = Policy(PolicyConfig(**options), "base")
        assert all(reference.by_token for reference in policy.references)
        return [reference.model for reference in policy.references]

    assert models() == [] and models(proximal="current") == []
    assert models(proximal="start") == ["start"]
    assert models(kl_coef=0.1, proximal="start") == ["start", "base"]
    shared = Policy(PolicyConfig(kl_coef=0.1, proximal="start"), "start")
    assert [reference.model for reference in shared.references] == ["start"]
    # Without entropy the head takes its fast path.
    assert list(Policy(PolicyConfig(entropy=False)).want) == ["logprob"]
    assert list(Policy(PolicyConfig()).want) == ["logprob", "entropy"]


def read_by_head(temperature: float) -> tuple[dict[str, Tensor], Tensor]:
    """(what the head reads, gradient of x of a sum over all of it) on this rank, which has its part
    of the vocabulary; a rank function."""
    x, weight, targets, factors = of_head()
    group: Any = dist.group.WORLD
    head = Head(weight.chunk(group.size())[group.rank()], group)
    found = head(x, targets, Policy(PolicyConfig(temperature=temperature)).want)
    sum((found[name] * factor).sum() for name, factor in factors.items()).backward()  # type: ignore
    assert x.grad is not None
    # Each rank saw its own part of the vocabulary.
    dist.all_reduce(x.grad)
    return {name: value.detach() for name, value in found.items()}, x.grad


def of_head() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Hidden states, output weight, tokens, and what each result is multiplied by."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(11, 6, generator=generator).double().requires_grad_()
    weight = torch.randn(26, 6, generator=generator).double()
    targets = torch.randint(26, (11,), generator=generator)
    factors = torch.randn(2, 11, generator=generator).double()
    return x, weight, targets, {"logprob": factors[0], "entropy": factors[1]}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_a_temperature_is_trl_s(world: int, temperature: float) -> None:
    x, weight, targets, factors = of_head()
    logprobs, entropies = selective_log_softmax_and_entropy(
        x @ weight.t(), targets, temperature=temperature
    )
    ((logprobs * factors["logprob"]).sum() + (entropies * factors["entropy"]).sum()).backward()
    for results, gradient in run_ranks(read_by_head, world, temperature):
        torch.testing.assert_close(results["logprob"], logprobs.detach(), rtol=0, atol=ATOL)
        torch.testing.assert_close(results["entropy"], entropies.detach(), rtol=0, atol=ATOL)
        torch.testing.assert_close(gradient, x.grad, rtol=0, atol=ATOL)
