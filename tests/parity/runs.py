"""Make the config of a short run on a small model, and read what a run wrote down."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalora.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoRAConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RLConfig,
    RunConfig,
    TrainConfig,
)
from megalora.config.recompute import recompute_from


def make_config(
    base: Path,
    chats: Path,
    out: Path,
    parallel: dict[str, Any],
    recompute: str = "off",
    *,
    lora: LoRAConfig | None = None,
    dtype: str = "float32",
    eval: int = 21,
    data_seed: int = 0,
    data: Mapping[str, Any] | None = None,
    objective: ObjectiveConfig | None = None,
    rl: RLConfig | None = None,
    weight_format: str = "auto",
    **train: Any,
) -> RunConfig:
    """Five steps at a constant rate unless ``train`` says otherwise; no logs but
    ``metrics.jsonl``.

    Args:
        recompute: a level, or text such as ``full3+off``.
        data: more options of the ``data`` section.
        train: of the ``train`` section.
    """
    options = {
        "steps": 5,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "lr": 1e-3,
        "schedule": "constant",
    }
    # tests/verify compares the base; here every run would pay for it.
    options["check_base"] = "off"
    return RunConfig(
        model=ModelConfig(path=str(base), dtype=dtype, weight_format=weight_format),  # type: ignore
        parallel=ParallelConfig(**parallel),
        lora=lora or LoRAConfig(rank=4, alpha=12.0),
        data=DataConfig(
            **{"train": str(chats), "eval": eval, "max_length": 256, "seed": data_seed}
            | dict(data or {})
        ),
        objective=objective or ObjectiveConfig(),
        rl=rl or RLConfig(),
        train=TrainConfig(**{**options, "recompute": recompute_from(recompute), **train}),
        checkpoint=CheckpointConfig(dir=str(out)),
        log=LogConfig(tensorboard=False, progress=False),
    )


def records(run: Path, key: str) -> list[float]:
    """Every value of ``key`` in ``metrics.jsonl``, in order."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        # Evaluations and steps have rows of their own.
        if key in row:
            found.append(row[key])
    return found
