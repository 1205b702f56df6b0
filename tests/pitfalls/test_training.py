"""Pitfalls 7, 8 and 10: experts that never train, checkpoints that lose shards, recomputation and
auxiliary losses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalora.adapters.training_state import read_state
from megalora.config import CheckpointConfig, LoRAConfig, ParallelConfig, RunConfig
from megalora.lora.gather import gather_tensors
from megalora.lora.init import initial_a
from megalora.lora.select import plan
from megalora.train.checkpoint.load import load_checkpoint
from megalora.train.loop import train
from megalora.train.optim import STATE_KEYS
from tests.distributed.ranks import run_ranks
from tests.parity.built import built, first_gradients, random_adapter, whole_adapter
from tests.parity.everything import LORA, config_of
from tests.parity.runs import records
from tests.whole_state import RANK_0, change_state, gathered_state, whole_state


def trained(run: Path, step: int = 2) -> dict[str, Tensor]:
    """Masters and moments as the checkpoint holds them."""
    return whole_state(run / f"step_{step:06d}")


def test_07_every_expert_is_adapted_and_trains(everything, chats, tmp_path) -> None:
    """Also under full recomputation, where the first block's input needs no gradient: the embedding
    is frozen."""
    config = config_of(
        everything, chats, tmp_path, {"ep": 2}, LoRAConfig(rank=3, alpha=12.0), recompute="full"
    )
    run_ranks(train, 2, config)
    masters = {}
    for name, t in trained(tmp_path).items():
        if name.startswith("param."):
            masters[name.removeprefix("param.")] = t
    # Rank 3 of every matrix: 3 (in + out) numbers. Two layers, of which one has 8 routed experts
    # and a shared one, the other a dense MLP.
    hidden = 96
    q = 12 * 16
    kv = 2 * 16
    routed = 80
    shared = 112
    dense = 144
    # Two layers' q, k and v, o; then gate, up and down of every MLP.
    attention = 2 * 3 * ((hidden + q) + 2 * (hidden + kv) + (q + hidden))
    mlps = 3 * 3 * (8 * (hidden + routed) + (hidden + shared) + (hidden + dense))
    num_elements = 0
    num_of_experts = 0
    for name, master in masters.items():
        num_elements += master.numel()
        num_of_experts += ".mlp.experts." in name
    assert num_elements == attention + mlps
    # A and B of gate, up and down of 8 experts.
    assert num_of_experts == 8 * 3 * 2
    for name, master in masters.items():
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        if ".lora_A." in name:
            start = initial_a(0, module, 3, master.shape[1])
        else:
            start = torch.zeros_like(master)
        # Adam moves an entry by about the rate, 1e-3, at each step, however small its gradient
        # is: a tenth of one step somewhere in the tensor is little to ask.
        assert (master - start).abs().max() > 1e-4, f"{name} has not moved in two steps of 1e-3"


# A slip of the fingers, our own name of the fused tensor, a layer that the model lacks, and the
# name that another family's files give to gate_proj.
@pytest.mark.parametrize("typo", ["gate_porj", "experts.gate_up", "model.layers.7.q_proj", "w1"])
def test_07_a_target_that_matches_nothing_is_an_error(everything, typo) -> None:
    with pytest.raises(ValueError, match=r"lora.target_modules: .* matches nothing in this model"):
        plan(LoRAConfig(target_modules=["q_proj", typo]), ParallelConfig(), everything)


def state_after_load(config: RunConfig, checkpoint: Path) -> dict[str, Tensor]:
    """What a resumed run holds on all ranks together, before its first step."""
    with built(config) as run:
        load_checkpoint(read_state(checkpoint), run.model, run.optimizer)
        parameters = run.model.parameters
        whole = {}
        for key in STATE_KEYS:
            state = gathered_state(run.optimizer, key, parameters, run.model.groups)
            # Rank 0 alone gets the whole tensors.
            tensors = gather_tensors(run.model.shards, state, run.model.groups) or {}
            for name, t in tensors.items():
                whole[f"{key}.{name}"] = t
        for name, t in (whole_adapter(run) or {}).items():
            whole[f"adapter.{name}"] = t
        return whole


@pytest.mark.slow
def test_08_a_checkpoint_means_the_same_to_every_layout(everything, chats, tmp_path) -> None:
    """Saved at TP 2 x EP 2 x ETP 2, loaded where all is split otherwise: every bit is there, and
    the run goes on."""
    config = config_of(everything, chats, tmp_path / "whole", {"tp": 2, "ep": 2, "etp": 2}, steps=3)
    run_ranks(
        train, 4, replace(config, checkpoint=CheckpointConfig(dir=str(tmp_path / "whole"), every=2))
    )
    saved = trained(tmp_path / "whole")
    checkpoint = tmp_path / "whole/step_000002"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    # Nothing split; attention and experts over four ranks each; stages and halves of experts.
    layouts: list[tuple[int, dict[str, int]]] = [
        (1, {}),
        (4, {"tp": 4, "ep": 4}),
        (4, {"pp": 2, "etp": 2}),
    ]
    for i, (world, parallel) in enumerate(layouts):
        rest = replace(
            config,
            parallel=ParallelConfig(**parallel),
            checkpoint=CheckpointConfig(dir=str(tmp_path / f"rest{i}"), resume=str(checkpoint)),
        )
        loaded = run_ranks(state_after_load, world, rest, checkpoint)[0]
        assert loaded.keys() == saved.keys() | {f"adapter.{name}" for name in adapter}
        for name, t in saved.items():
            assert torch.equal(loaded[name], t), name
        for name, t in adapter.items():
            assert torch.equal(loaded[f"adapter.{name}"], t), name
        run_ranks(train, world, rest)
        # The limits of the grid in float32, with their derivation: ``LIMITS`` in tests/parity/case.
        for key, allowed in (("loss", 1e-6), ("grad_norm", 1e-5)):
            ours = records(tmp_path / f"rest{i}", key)
            assert ours == pytest.approx(records(tmp_path / "whole", key)[2:], rel=allowed)
        uninterrupted = trained(tmp_path / "whole", 3)
        resumed = trained(tmp_path / f"rest{i}", 3)
        for name, value in uninterrupted.items():
            if name.startswith("param."):
                # A step moves a parameter by 1e-3: layouts may part by a hundredth of one.
                torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-5, msg=name)


def test_08_a_missing_or_cut_tensor_is_an_error(everything, chats, tmp_path) -> None:
    config = config_of(everything, chats, tmp_path / "run", {}, steps=1)
    run_ranks(train, 1, config)
    checkpoint = tmp_path / "run/step_000001"
    whole = load_file(checkpoint / RANK_0)
    # A first moment of one expert: adapter_model.safetensors does not have it, so nothing but the
    # optimizer's file could bring it back.
    of_expert_5 = [name for name in whole if ".experts.5.down_proj.lora_A" in name]
    [name] = [name for name in of_expert_5 if name.startswith("exp_avg.")]

    def lose(state: dict[str, Tensor]) -> None:
        del state[name]

    def cut(state: dict[str, Tensor]) -> None:
        # down_proj's A is [rank, 80]: half of its elements, as a lost shard would leave.
        state[name] = whole[name][: whole[name].numel() // 2].clone()

    for damage in (lose, cut):
        change_state(checkpoint, damage)
        resumed = replace(
            config, checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), resume=True)
        )
        with pytest.raises(Exception, match=r"experts.5.down_proj.lora_A.weight"):
            run_ranks(train, 1, resumed)


def losses_and_aux_settings(config: RunConfig) -> tuple[list[float], Any]:
    with built(config) as run:
        router = run.model.chunks[0].config  # pyright: ignore
        settings = (
            router.moe_router_load_balancing_type,
            router.moe_aux_loss_coeff,
            router.moe_z_loss_coeff,
        )
        batches = run.batches.of_step(0)
        # ``train`` computes the loss before its step, so both see the same weights.
        training, _ = run.stepper.train(batches, run.optimizer)
        evaluation, *_ = run.stepper.evaluate(batches)
        return [training, evaluation], settings


def test_10_recomputation_routes_the_same_way_and_gives_the_same_bits(
    everything, chats, tmp_path
) -> None:
    """With dropout, whose masks must be drawn again as they were."""
    random_adapter(tmp_path / "adapter.safetensors", LORA, everything)
    lora = replace(LORA, dropout=0.3)
    parallel = {"tp": 2, "ep": 2, "etp": 2}

    def loss_and_gradients(level: str) -> tuple[float, dict[str, Tensor]]:
        config = config_of(everything, chats, tmp_path, parallel, lora, recompute=level)
        return run_ranks(first_gradients, 4, config, tmp_path / "adapter.safetensors")[0]

    loss_off, gradients_off = loss_and_gradients("off")
    for level in ("selective", "full"):
        loss, gradients = loss_and_gradients(level)
        assert loss == loss_off
        for name, gradient in gradients_off.items():
            assert torch.equal(gradients[name], gradient), (level, name)


def test_10_no_auxiliary_loss_is_added_under_a_frozen_router(everything, chats, tmp_path) -> None:
    """What is trained on is what is reported: the cross entropy of target tokens and nothing
    else."""
    (training, evaluation), settings = run_ranks(
        losses_and_aux_settings, 1, config_of(everything, chats, tmp_path, {})
    )[0]
    assert settings == ("none", 0.0, None)
    assert training == evaluation
