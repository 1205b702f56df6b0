"""Tokens go to the experts that they went to while they were sampled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalora.config import RunConfig
from megalora.data.chat import Encoded
from megalora.data.splits import Split
from megalora.generate.generate import generate
from megalora.generate.options import Sampling
from megalora.model.replay import Replay
from megalora.train.batches import Batches
from tests.distributed.ranks import run_ranks
from tests.oracles.training import Oracle
from tests.parity.built import built, random_adapter, random_factors
from tests.parity.gradients import reduced_gradients
from tests.parity.models import make_model
from tests.parity.runs import make_config

LENGTHS = (9, 17, 5, 12, 8, 3)
MODELS = ("mixed", "tied", "shared", "olmoe", "mixtral", "glm4_moe")
"""Of all families, and with weights that are not normalised."""


def routed_samples(num_layers: int, num_experts: int, top_k: int) -> list[Encoded]:
    """Random tokens that go to random experts; one sample chooses by itself."""
    generator = np.random.default_rng(0)
    samples: list[Encoded] = []
    for length in LENGTHS:
        ids = generator.integers(1, 400, length).astype(np.int32)
        mask = generator.random(length) < 0.7
        mask[-1] = True
        scores = generator.random((length - 1, num_layers, num_experts))
        routes = scores.argsort(-1)[..., :top_k].astype(np.int16)
        samples.append(Encoded(ids, mask, routes=None if length == 12 else routes))
    return samples


def replayed(config: RunConfig, weights: Path, on: bool) -> tuple[float, dict[str, Tensor] | None]:
    """(loss, gradients on the first rank) of these samples; a rank function."""
    with built(config, weights) as run:
        layers = sorted(run.model.shape.moe_layers)
        shape = run.model.shape
        samples = routed_samples(len(layers), shape.num_experts, shape.top_k)
        split = Split("", 64, samples, route_shape=(len(layers), shape.top_k))
        batches = Batches(config, run.groups, split, None)
        if on:
            run.stepper.replay = Replay(run.stepper.chunks, layers)
        loss, _ = run.stepper.train(batches.of_step(0), run.optimizer)
        return loss, reduced_gradients(run.model, run.optimizer)


class Forced(Oracle):
    """transformers with routers that take the choices they are given."""

    def of(self, samples: list[Encoded]) -> tuple[float, dict[str, Tensor]]:
        """(mean loss, gradients by factor)"""
        routers: list[Any] = []
        for module in self.model.modules():
            if hasattr(module, "top_k") and hasattr(module, "weight"):
                routers.append(module)
        own = [router.forward for router in routers]
        count = sum(sample.num_target_tokens for sample in samples)
        total = 0.0
        for sample in samples:
            for layer, router in enumerate(routers):
                router.forward = own[layer]
                if sample.routes is not None:
                    router.forward = forced(router, torch.tensor(sample.routes[:, layer]).long())
            loss = self.loss([sample]) * sample.num_target_tokens / count
            loss.backward()
            total += loss.item()
        return total, {name: t.grad for name, t in self.factors.items() if t.grad is not None}


def forced(router: Any, chosen_TK: Tensor) -> Any:
    """The router's forward with this choice (transformers' Qwen3MoeTopKRouter)."""

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        weights = logits.double().softmax(-1).gather(1, chosen_TK)
        if router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen_TK

    return forward


LAYOUTS = {
    "1": (1, {}, {"micro_batch_size": 3}),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}, {"micro_batch_size": 1}),
    "pp2 full": (2, {"pp": 2}, {"micro_batch_size": 2, "recompute": "full"}),
    "cp2 packed": (2, {"cp": 2}, {"micro_batch_tokens": 63, "micro_batch_size": 1}),
}


@pytest.mark.parametrize(
    "layout",
    [name if name == "1" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_loss_and_gradients_of_given_experts(
    layout: str, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    world, parallel, options = LAYOUTS[layout]
    config = make_config(
        tiny, chats, tmp_path, parallel, global_batch_size=len(LENGTHS), eval=1,
        data={"eval": None, "max_length": 64}, **options,
    )  # fmt: skip
    random_adapter(tmp_path / "start.safetensors", config.lora, tiny)
    _, factors = random_factors(config.lora, tiny)
    oracle = Forced(tiny, factors, config.lora.alpha / config.lora.rank)
    shape = oracle.model.config
    samples = routed_samples(shape.num_hidden_layers, shape.num_experts, shape.num_experts_per_tok)
    expected, gradients = oracle.of(samples)
    loss, ours = run_ranks(replayed, world, config, tmp_path / "start.safetensors", True)[0]
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        difference = (ours[name].double() - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert difference < 1e-4, name
    # They have an effect.
    loss, _ = run_ranks(replayed, world, config, tmp_path / "start.safetensors", False)[0]
    assert abs(loss - expected) > 1e-3


def again(config: RunConfig, weights: Path) -> tuple[float, float]:
    """Differences of a completion's log-probabilities per token between sampling and a pass behind
    it, with routes as they were sampled and with others; a rank function."""
    with built(config, weights) as run:
        layers = sorted(run.model.shape.moe_layers)
        prompts = [[5, 6, 7], [8, 9], [11, 12, 13, 14]]
        answers = generate(
            run.model, prompts, Sampling(temperature=1, max_new_tokens=7), routes=True
        )
        run.stepper.replay = Replay(run.stepper.chunks, layers)
        found: list[float] = []
        for shift in (0, 1):
            total = 0.0
            count = 0
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = np.array([*prompt, *answer.tokens], np.int32)
                mask = np.arange(len(ids)) >= len(prompt)
                routes = (answer.routes + shift) % run.model.shape.num_experts
                assert routes.shape == (len(ids) - 1, len(layers), run.model.shape.top_k)
                split = Split(
                    "", 64, [Encoded(ids, mask, routes=routes.astype(np.int16))],
                    route_shape=routes.shape[1:],
                )  # fmt: skip
                batches = Batches(config, run.groups, split, split)
                mean, number = run.stepper.evaluate(batches.of_eval())
                total += abs(mean * number + sum(answer.logprobs))
                count += number
            found.append(total / count)
        return found[0], found[1]


@pytest.mark.parametrize(
    "family", [MODELS[0], *(pytest.param(f, marks=pytest.mark.slow) for f in MODELS[1:])]
)
def test_what_was_sampled_is_computed_again(family: str, chats: Path, tmp_path: Path) -> None:
    base = make_model(family, tmp_path / "base")
    config = make_config(
        base, chats, tmp_path, {"ep": 2}, eval=1, data={"eval": None, "max_length": 64},
        global_batch_size=2, micro_batch_size=1,
    )  # fmt: skip
    random_adapter(tmp_path / "start.safetensors", config.lora, base)
    for same, shifted in run_ranks(again, 2, config, tmp_path / "start.safetensors"):
        assert same < 1e-5
        assert shifted > 1e-3
