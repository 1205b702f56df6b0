"""What the host needs to start a layer's operations: trainings of models whose arithmetic is next
to nothing, one against the other."""

import statistics
import tempfile
from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from megalora.bench.clock import slowest
from megalora.bench.rows import BenchOptions
from megalora.bench.steps import one_step, timed_steps, training
from megalora.config import (
    DataConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

FEW = 1
MANY = 4
"""Layers of the two models; what they differ in is the time of ``MANY - FEW`` layers."""
STEPS = 12
TINY = {
    "model_type": "qwen3_moe", "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
    "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": True,
    "vocab_size": 64, "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}  # fmt: skip


def layer_overhead(dtype: str) -> dict[str, float]:
    """Seconds of a layer's forward and of its backward, and of the rest of a step, on the slowest
    rank; collective.

    Every rank trains samples of its own, experts not shared out. Recomputing whole layers adds a
    forward, which tells it from backward.
    """
    with tempfile.TemporaryDirectory() as folder:
        few, many, again = (
            _seconds(Path(folder), *of, dtype)
            for of in ((FEW, "off"), (MANY, "off"), (MANY, "full"))
        )
        base = _seconds(Path(folder), FEW, "full", dtype)
    layers = MANY - FEW
    both = max((many - few) / layers, 1e-9)
    forward = min(max(((again - base) - (many - few)) / layers, 0.1 * both), 0.9 * both)
    return {
        "layer_forward_s": forward,
        "layer_backward_s": both - forward,
        "step_s": max(few - FEW * both, 0.0),
    }


def _seconds(folder: Path, num_layers: int, recompute: str, dtype: str) -> float:
    """Median of a step with one microbatch of four tokens."""
    path = folder / f"{num_layers}.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({**TINY, "num_hidden_layers": num_layers})))
    config = RunConfig(
        model=ModelConfig(path=str(path), dtype=dtype),  # pyright: ignore[reportArgumentType]
        data=DataConfig(train="random", max_length=5),
        parallel=ParallelConfig(),
        lora=LoRAConfig(rank=2),
        train=TrainConfig(
            steps=1,
            global_batch_size=dist.get_world_size(),
            recompute=recompute,  # pyright: ignore[reportArgumentType]
        ),
    )
    with training(config, BenchOptions(weights="random")) as run:
        for number in range(3):
            one_step(run, number)
        seconds, _ = timed_steps(run, 3, STEPS)
    return slowest(statistics.median(seconds))
