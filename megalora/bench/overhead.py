"""Measure the host's time per layer, by training models whose arithmetic takes next to no time."""

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
"""Layers of the two models; their steps differ by the time of ``MANY - FEW`` layers."""
STEPS = 12
"""Timed steps of each training."""
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

    Every rank trains samples of its own, without expert parallelism. Recomputing whole layers adds
    a forward, which tells it from backward.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = _seconds(folder, FEW, "off", dtype)
        many = _seconds(folder, MANY, "off", dtype)
        few_again = _seconds(folder, FEW, "full", dtype)
        many_again = _seconds(folder, MANY, "full", dtype)
    layers = MANY - FEW
    # Forward and backward of one layer; two noisy times may even differ the wrong way.
    both = max((many - few) / layers, 1e-9)
    # With recomputation a layer costs its forward a second time.
    forward = ((many_again - few_again) - (many - few)) / layers
    # Noise may not leave forward or backward less than a tenth of both.
    forward = min(max(forward, 0.1 * both), 0.9 * both)
    return {
        "layer_forward_s": forward,
        "layer_backward_s": both - forward,
        "step_s": max(few - FEW * both, 0.0),
    }


def _seconds(folder: Path, num_layers: int, recompute: str, dtype: str) -> float:
    """Median time of a step with one microbatch of four tokens, on the slowest rank."""
    # An architecture without weights, which are drawn.
    path = folder / f"{num_layers}.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({**TINY, "num_hidden_layers": num_layers})))
    config = RunConfig(
        model=ModelConfig(path=str(path), dtype=dtype),  # pyright: ignore[reportArgumentType]
        # Five tokens give four predictions.
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
        # The first two steps check gradients, and the first one's kernels compile.
        for number in range(3):
            one_step(run, number)
        seconds, _ = timed_steps(run, 3, STEPS)
    return slowest(statistics.median(seconds))
