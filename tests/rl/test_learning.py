"""Rewards rise: from a random base, with everything that ``megalora rl`` does."""

from pathlib import Path
from typing import Any

import pytest

from megalora.config import LoRAConfig
from recipes.grpo import rewards
from tests.distributed.ranks import run_ranks
from tests.parity.runs import records
from tests.rl.played import rl_config, train_and_judge, write_prompts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "world", "parallel"),
    [(1, 1, {}), (2, 2, {"ep": 2})],
    ids=["1", "2 ep2"],
)
def test_a_random_model_learns_to_say_digits(
    seed: int, world: int, parallel: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    """The third seed is the recipe's (tests/recipes/test_grpo.py)."""
    config = rl_config(
        tiny, write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run", {"clip_high": 0.28},
        rl={"rewards": f"{rewards.__file__}:digits", "group_size": 8, "concurrency": 128,
            "reward_workers": 1},
        lora=LoRAConfig(rank=16, alpha=32), parallel=parallel, steps=16, lr=7e-3, seed=seed,
        data_seed=seed, global_batch_size=128, micro_batch_size=64, eval=1, data={"eval": None},
    )  # fmt: skip
    run_ranks(train_and_judge, world, config)
    found = records(tmp_path / "run", "reward")
    assert found[0] < 0.1
    assert max(found[:12]) > 0.8 and max(found) > 0.9
    # To the last step nothing lies between the engine and training but rounding.
    assert max(records(tmp_path / "run", "engine_gap")) < 2e-6
