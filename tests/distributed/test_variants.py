"""Other adapters and other models than the plain ones of test_layouts.py, in layouts that split what they touch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megalora.config import LoRAConfig
from megalora.data.loader import global_batch_indices, load_split, split_off_eval
from megalora.lora.init import initial_a
from megalora.lora.spec import resolve, tensor_name
from megalora.model.shape import model_shape, read_hf_config
from megalora.tiny import make_tiny
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import BATCH, EVAL, LR, make_config, records
from tests.oracles.training import Oracle

STEPS = 3
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = {"q_proj": 3, "v_proj": 5, "up_proj": 2, "down_proj": 6}

# model, adapter, world size, layout
VARIANTS = {
    "router and lm_head": ("moe", LoRAConfig(rank=4, target_modules=[*NAMES, "gate", "lm_head"]), 4, {"tp": 2, "ep": 2}),
    "a rank and alpha for each projection": (
        "moe", LoRAConfig(rank=4, rank_pattern=RANKS, alpha_pattern={"k_proj": 3.0, "gate_proj": 20.0}), 4, {"tp": 2, "ep": 2, "etp": 2},
    ),
    "rslora with expert_rank": ("moe", LoRAConfig(rank=4, expert_rank=2, use_rslora=True), 2, {"ep": 2}),
    "single projections of fused weights": ("moe", LoRAConfig(rank=4, target_modules=["k_proj", "up_proj"]), 4, {"tp": 2, "ep": 2, "etp": 2}),
    "some layers": ("moe", LoRAConfig(rank=4, layers="1,3"), 4, {"pp": 2, "tp": 2}),
    "dense": ("dense", LoRAConfig(rank=4), 4, {"tp": 2, "pp": 2}),
    "dense and MoE layers mixed": ("mixed", LoRAConfig(rank=4), 4, {"tp": 2, "ep": 2}),
    "tied embeddings": ("tied", LoRAConfig(rank=4, target_modules=[*NAMES, "lm_head"]), 4, {"tp": 2, "pp": 2}),
    "probabilities not normalised": ("raw probabilities", LoRAConfig(rank=4), 2, {"tp": 2}),
}  # fmt: skip
MODELS = {
    "moe": {},
    "dense": {"arch": "qwen3"},
    "mixed": {"mlp_only_layers": [1], "num_hidden_layers": 3},
    "tied": {"tie_word_embeddings": True},
    "raw probabilities": {"norm_topk_prob": False},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {name: make_tiny(root / name.replace(" ", "-"), **options) for name, options in MODELS.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trains_the_adapter_that_transformers_trains(name, models, chats, tmp_path):
    model, lora, world, parallel = VARIANTS[name]
    config = replace(make_config(models[model], chats, tmp_path, parallel, steps=STEPS), lora=lora)
    run_ranks(train, world, config)

    split = load_split(str(chats), AutoTokenizer.from_pretrained(models[model]), format="auto", max_length=256)
    train_split, eval_split = split_off_eval(split, EVAL, seed=0)
    factors, scales = {}, {}
    for a in resolve(lora, model_shape(read_hf_config(models[model]))):
        for module in a.hf_modules():
            factors[tensor_name(module, "A")] = initial_a(0, module, a.rank, a.in_features)
            factors[tensor_name(module, "B")] = torch.zeros(a.out_features, a.rank)
            scales[module] = a.alpha / (a.rank**0.5 if lora.use_rslora else a.rank)
    oracle = Oracle(models[model], factors, scales)
    with torch.no_grad():
        assert records(tmp_path, "eval_loss")[0] == pytest.approx(oracle.loss(eval_split.samples).item(), rel=1e-5)
    batches = [
        [train_split.samples[i] for i in global_batch_indices(s, BATCH, len(train_split.samples), 0)]
        for s in range(STEPS)
    ]
    losses, norms = oracle.train(batches, LR, clip=1.0)
    assert records(tmp_path, "loss") == pytest.approx(losses, rel=1e-5)
    assert records(tmp_path, "grad_norm") == pytest.approx(norms, rel=1e-4)
    state = load_file(tmp_path / f"step_{STEPS:06d}/training_state/optimizer.safetensors")
    trained = {key.removeprefix("param."): value for key, value in state.items() if key.startswith("param.")}
    assert trained.keys() == factors.keys()
    for tensor, value in oracle.factors.items():
        torch.testing.assert_close(
            trained[tensor], value.detach().float(), rtol=0, atol=1e-5, msg=lambda m, t=tensor: f"{t}: {m}"
        )
