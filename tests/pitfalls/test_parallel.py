"""Pitfalls 1 to 4: what a parallel layout does to an adapter without a word (the list is in
tests/pitfalls/README.md)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.config import RunConfig
from megalora.lora.spec import Adapted
from tests.distributed.ranks import run_ranks
from tests.oracles.training import Oracle
from tests.parity.built import adapter_of, built, first_gradients, random_adapter
from tests.parity.compare import of_largest, projection
from tests.parity.everything import LORA, WITHOUT_ROUTER, config_of, first_batch


def scales(adapted: list[Adapted]) -> dict[str, float]:
    """alpha / rank of ``LORA`` for every module, written out so that ours is not trusted."""
    found = {}
    for a in adapted:
        found |= dict.fromkeys(a.hf_modules(), 12.0 / 3)
    return found


def assert_gradients_equal(found: dict[str, Tensor], oracle: Oracle) -> None:
    """To 1e-5 of the largest entry in the same projection, all experts together; float32 sums of
    some hundred terms."""
    gradients = {}
    trained = set()
    every = set()
    for name, factor in oracle.factors.items():
        assert factor.grad is not None, name
        gradients[name] = factor.grad
        every.add(projection(name))
        if factor.grad.any():
            trained.add(projection(name))
    assert of_largest(found, gradients) <= 1e-5
    # Zeros equal zeros: every projection must have a gradient for the comparison to mean something.
    assert trained == every


def test_01_initial_values_depend_on_seed_and_name_alone(everything, chats, tmp_path) -> None:
    # One rank; experts alone over two and over four ranks; everything split at once.
    layouts = [(1, {}), (2, {"ep": 2}), (4, {"ep": 4}), (4, {"tp": 4, "ep": 2, "etp": 2})]
    adapters = []
    for world, parallel in layouts:
        config = config_of(everything, chats, tmp_path, parallel)
        adapters.append(run_ranks(adapter_of, world, config)[0])
    first, *others = adapters
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            assert torch.equal(other[name], tensor), name
    beginnings = []
    for name, a in first.items():
        if ".lora_A." not in name:
            continue
        # Kaiming-uniform over this matrix's own fan-in, never over the stacked experts: the largest
        # of 240 or more numbers lies near the bound.
        bound = a.shape[1] ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound, name
        beginnings.append(tuple(a.flatten()[:8].tolist()))
    # A seed for each rank or layer instead of each name gives several tensors the same values.
    assert len(set(beginnings)) == len(beginnings), "no two share their values"


@pytest.mark.parametrize("micro_batch_size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("world", "parallel"),
    [(4, {"ep": 4}), (4, {"tp": 2, "ep": 2, "etp": 2}), (4, {"tp": 4, "ep": 2}), (2, {"etp": 2})],
    ids=["ep4", "tp2-ep2-etp2", "tp4-ep2", "etp2"],
)
def test_02_gradient_is_the_sum_over_all_ranks_and_an_idle_rank_adds_nothing(
    world, parallel, micro_batch_size, idle, chats, tmp_path
) -> None:
    """Every data-parallel rank has its own microbatches; at EP 4 the last rank's experts get no
    token at all."""
    # An adapter of the router would wake the idle experts up.
    lora = replace(LORA, target_modules=WITHOUT_ROUTER)
    adapted, factors = random_adapter(tmp_path / "adapter.safetensors", lora, idle)
    # 8 samples in a global batch: a rank has several microbatches of 1, fewer of 2. A mean per
    # microbatch instead of a sum over all would differ between the two.
    config = config_of(
        idle, chats, tmp_path / "run", parallel, lora, micro_batch_size=micro_batch_size
    )
    loss, gradients = run_ranks(first_gradients, world, config, tmp_path / "adapter.safetensors")[0]
    oracle = Oracle(idle, factors, scales(adapted))
    expected = oracle.loss(first_batch(idle, chats))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert_gradients_equal(gradients, oracle)
    num_unused = 0
    for name, gradient in gradients.items():
        if ".experts.6." in name or ".experts.7." in name:
            num_unused += 1
            assert gradient.count_nonzero() == 0, name
    # Two experts of one layer, A and B of gate, up and down.
    assert num_unused == 12


def first_draw(config: RunConfig) -> list[float]:
    with built(config):
        return torch.rand(4).tolist()


def test_02_every_rank_draws_its_own_dropout(everything, chats, tmp_path) -> None:
    """With one seed for all, data-parallel ranks would drop the same places of different
    samples."""
    draws = run_ranks(first_draw, 4, config_of(everything, chats, tmp_path, {"tp": 2, "ep": 2}))
    # Tensor-parallel ranks too: under sequence parallelism each has other tokens.
    different = {tuple(draw) for draw in draws}
    assert len(different) == 4


def effects(config: RunConfig, weights: Path, projections: list[str]) -> list[float]:
    """The loss with one projection's adapters alone, for each projection, and without any at the
    end."""
    with built(config, weights) as run, torch.no_grad():
        batches = run.batches.of_step(0)
        losses = []
        saved = {p: p.data.clone() for p in run.model.parameters}
        for projection in [*projections, "none"]:
            for shard in run.model.shards:
                # From the saved values each time: what was switched off must come back.
                on = _projection(shard.name) == projection
                shard.of({shard.parameter: shard.parameter.data}).copy_(shard.of(saved) * on)
            losses.append(run.stepper.evaluate(batches)[0])
        return losses


def _projection(name: str) -> str:
    """``layers.0.mlp.experts.gate_proj`` of a tensor name."""
    module = name.removeprefix("base_model.model.").removeprefix("model.").split(".lora_")[0]
    parts = []
    for i, part in enumerate(module.split(".")):
        # ``layers.0`` stays; a number further back is an expert's.
        if i < 2 or not part.isdigit():
            parts.append(part)
    return ".".join(parts)


@pytest.mark.parametrize(
    "parallel",
    [{"tp": 2, "ep": 2}, pytest.param({"tp": 2, "ep": 1, "etp": 2}, marks=pytest.mark.slow)],
    ids=["tp2-ep2", "tp2-etp2"],
)
def test_03_the_delta_is_whole_and_scaled_once(parallel, everything, chats, tmp_path) -> None:
    """Each projection's own effect on the loss, over that effect in plain transformers with merged
    weights, is one."""
    adapted, factors = random_adapter(tmp_path / "adapter.safetensors", LORA, everything)
    factors_of: dict[str, dict[str, Tensor]] = {}
    for name, factor in factors.items():
        factors_of.setdefault(_projection(name), {})[name] = factor
    projections = sorted(factors_of)
    # Attention twice, routed experts with the router, shared expert, dense MLP, lm_head.
    assert len(projections) == 4 + 4 + 4 + 3 + 3 + 1
    config = config_of(
        everything, chats, tmp_path / "run", parallel, global_batch_size=4, micro_batch_size=2
    )
    by_rank = run_ranks(effects, 2, config, tmp_path / "adapter.safetensors", projections)
    # The loss is reduced over all ranks, so rank 0's is everybody's.
    *losses, without = by_rank[0]
    samples = first_batch(everything, chats, 4)
    with torch.no_grad():
        base = Oracle(everything, {}, {}).loss(samples).item()
        for projection, loss in zip(projections, losses, strict=True):
            oracle = Oracle(everything, factors_of[projection], scales(adapted))
            effect = oracle.loss(samples).item() - base
            assert abs(effect) > 1e-4, f"{projection} must do something"
            # Two losses of about 6, each right to 1e-7: the difference is right to 1e-6.
            assert loss - without == pytest.approx(effect, abs=2e-6), projection


def replicated_gradients(config: RunConfig, weights: Path) -> dict[str, Tensor]:
    with built(config, weights) as run:
        run.stepper.train(run.batches.of_step(0), run.optimizer)
        grads: dict[Any, Tensor] = {p: p.main_grad for p in run.model.parameters}  # type: ignore
        # The distributed optimizer reduces into the slice that a rank steps: over more than one
        # data-parallel replica a rank's gradient is whole in that slice only.
        replicas = {"tp": run.model.groups.dp.size(), "etp": run.model.groups.edp.size()}
        found = {}
        for shard in run.model.shards:
            # One shard: the factor is replicated over its tensor-parallel group.
            if shard.num_shards == replicas[shard.group] == 1:
                found[shard.name] = shard.of(grads).clone()
        return found


@pytest.mark.parametrize("etp", [1, 2])
def test_04_replicated_factors_are_summed_over_tensor_parallel_ranks(
    etp, everything, chats, tmp_path
) -> None:
    """Under sequence parallelism each rank saw half of the tokens: the same bits on both ranks, and
    one rank's values."""
    random_adapter(tmp_path / "adapter.safetensors", LORA, everything)

    def gradients(world: int, parallel: dict) -> list[dict[str, Tensor]]:
        config = config_of(everything, chats, tmp_path / "run", parallel)
        return run_ranks(replicated_gradients, world, config, tmp_path / "adapter.safetensors")

    first, second = gradients(2, {"tp": 2, "etp": etp})
    (alone,) = gradients(1, {})
    assert first.keys() == second.keys() < alone.keys()
    kinds = set()
    has_experts = False
    for name in first:
        # ``...q_proj.lora_A.weight`` becomes ``q_proj_A``
        module, factor, _ = name.split(".")[-3:]
        kinds.add(module + factor.removeprefix("lora"))
        has_experts |= ".experts." in name
    # Column-parallel linears replicate A, row-parallel ones B; the router is replicated whole.
    assert {"q_proj_A", "o_proj_B", "gate_A", "gate_B", "lm_head_A"} <= kinds
    # At ETP 1 an expert lies whole on one rank: nothing of it is replicated over the group.
    assert has_experts == (etp == 2)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
        # Of the largest entry, but not below 1e-6: small gradients are sums of larger terms.
        largest = max(alone[name].abs().max().item(), 0.1)
        torch.testing.assert_close(gradient, alone[name], rtol=0, atol=1e-5 * largest)
