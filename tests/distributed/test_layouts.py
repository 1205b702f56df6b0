"""Every layout trains the adapter that plain transformers trains: initial loss, gradient norms, adapters, Adam moments."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from megalora.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megalora.data.loader import global_batch_indices, load_split, split_off_eval
from megalora.lora.init import initial_a
from megalora.lora.spec import resolve, tensor_name
from megalora.model.shape import model_shape, read_hf_config
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.oracles.training import Oracle, read_adapter

STEPS, BATCH, EVAL, LR, RANK, ALPHA = 5, 16, 21, 1e-3, 4, 12.0

# world size, parallel section, recompute. The first eight are the layouts the README promises.
LAYOUTS = {
    "single": (1, {}, "off"),
    "tp2": (2, {"tp": 2}, "off"),
    "pp2": (2, {"pp": 2}, "off"),
    "ep2": (2, {"ep": 2}, "off"),
    "tp2-ep2": (4, {"tp": 2, "ep": 2}, "off"),
    "tp2-ep2-etp2": (4, {"tp": 2, "ep": 2, "etp": 2}, "off"),
    "tp2-pp2-ep2": (8, {"tp": 2, "pp": 2, "ep": 2}, "off"),
    "ep4": (4, {"ep": 4}, "off"),
    "dp2": (2, {}, "full"),
    "etp2": (2, {"etp": 2}, "off"),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}, "off"),
    "tp2-pp2-vpp2": (4, {"tp": 2, "pp": 2, "vpp": 2}, "full"),
    "ep2-selective": (2, {"ep": 2}, "selective"),
}


def make_config(
    base: Path, chats: Path, out: Path, parallel: dict, recompute: str = "off", **train_options
) -> RunConfig:
    options = {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2, "lr": LR, "schedule": "constant"}
    return RunConfig(
        model=ModelConfig(path=str(base), dtype="float32"),
        parallel=ParallelConfig(**parallel),
        lora=LoRAConfig(rank=RANK, alpha=ALPHA),
        data=DataConfig(train=str(chats), eval=EVAL, max_length=256),
        train=TrainConfig(**{**options, "recompute": recompute, **train_options}),
        checkpoint=CheckpointConfig(dir=str(out)),
        log=LogConfig(tensorboard=False, progress=False),
    )


@dataclass
class Expected:
    eval_loss: float
    losses: list[float]
    norms: list[float]
    adapter: dict[str, Tensor]


@pytest.fixture(scope="module")
def expected(tiny: Path, chats: Path) -> Expected:
    return expected_training(tiny, chats)


def expected_training(tiny: Path, chats: Path) -> Expected:
    """Trained by the oracle, in one process, from the names and seed alone."""
    config = make_config(tiny, chats, Path("unused"), {})
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    split = load_split(str(chats), tokenizer, format="auto", max_length=256)
    train_split, eval_split = split_off_eval(split, EVAL, seed=0)
    factors = {}
    for a in resolve(config.lora, model_shape(read_hf_config(tiny))):
        for module in a.hf_modules():
            factors[tensor_name(module, "A")] = initial_a(0, module, a.rank, a.in_features)
            factors[tensor_name(module, "B")] = torch.zeros(a.out_features, a.rank)
    oracle = Oracle(tiny, factors, ALPHA / RANK)
    with torch.no_grad():
        eval_loss = oracle.loss(eval_split.samples).item()
    batches = [
        [train_split.samples[i] for i in global_batch_indices(step, BATCH, len(train_split.samples), 0)]
        for step in range(STEPS)
    ]
    losses, norms = oracle.train(batches, LR, clip=1.0)
    return Expected(eval_loss, losses, norms, {name: t.detach().float() for name, t in oracle.factors.items()})


def records(run: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_the_adapter_that_transformers_trains(name, tiny, chats, tmp_path, expected: Expected):
    world, parallel, recompute = LAYOUTS[name]
    run_ranks(train, world, make_config(tiny, chats, tmp_path, parallel, recompute))

    assert records(tmp_path, "eval_loss")[0] == pytest.approx(expected.eval_loss, rel=1e-5)
    assert records(tmp_path, "loss") == pytest.approx(expected.losses, rel=1e-5)
    assert records(tmp_path, "grad_norm") == pytest.approx(expected.norms, rel=1e-4)
    adapter = read_adapter(tmp_path / "step_000005")
    assert adapter.keys() == expected.adapter.keys()
    for tensor, value in expected.adapter.items():
        torch.testing.assert_close(adapter[tensor], value, rtol=0, atol=1e-5, msg=lambda m, t=tensor: f"{t}: {m}")
    moved = [t for n, t in adapter.items() if ".lora_B." in n and t.abs().max() > LR]
    assert len(moved) > 0.9 * len(adapter) / 2, "almost every B must have moved by more than one step"


def test_state_does_not_depend_on_the_layout(tiny, chats, tmp_path):
    """Masters and both Adam moments, whole tensors under HF names, in one layout against another."""
    for name in ("single", "tp2-ep2-etp2"):
        world, parallel, _ = LAYOUTS[name]
        run_ranks(train, world, make_config(tiny, chats, tmp_path / name, parallel, steps=3))
    one, other = (
        load_file(tmp_path / name / "step_000003/training_state/optimizer.safetensors")
        for name in ("single", "tp2-ep2-etp2")
    )
    assert one.keys() == other.keys()
    for tensor, value in one.items():
        # Adam divides by the root of the second moment, so a master may be off by a rounding of the step, not of itself.
        allowed = 1e-5 if tensor.startswith("param.") else 1e-4 * value.abs().max().item()
        assert (other[tensor] - value).abs().max().item() <= allowed, tensor
    assert all(math.isfinite(t.sum().item()) for t in one.values())


def test_bfloat16_follows_float32(tiny, chats, tmp_path):
    """bf16 has 8 bits: a loss of about 6.6 rounds to 1/32 or so, averaged over some hundred tokens."""
    config = make_config(tiny, chats, tmp_path, {"tp": 2, "ep": 2}, steps=3)
    run_ranks(train, 4, replace(config, model=ModelConfig(path=str(tiny), dtype="bfloat16")))
    run_ranks(train, 1, make_config(tiny, chats, tmp_path / "fp32", {}, steps=3))
    assert records(tmp_path, "loss") == pytest.approx(records(tmp_path / "fp32", "loss"), rel=2e-2)
    assert records(tmp_path, "grad_norm") == pytest.approx(records(tmp_path / "fp32", "grad_norm"), rel=1e-1)
    adapter = read_adapter(tmp_path / "step_000003")
    assert {t.dtype for t in adapter.values()} == {torch.bfloat16}
