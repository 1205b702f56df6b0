"""Learn from what vLLM samples: each step from the adapter that it should."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.config import CheckpointConfig, LoRAConfig
from megalora.rl.rollouts import FOLDER
from megalora.serve.live.address import TOKEN as VARIABLE
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from recipes.grpo import rewards
from tests.distributed.ranks import run_ranks
from tests.parity.runs import records
from tests.rl.played import rl_config, train_and_judge, write_prompts
from tests.serve.conftest import TOKEN

pytestmark = pytest.mark.vllm


def versions(run: Path, step: int) -> set[int]:
    """Of all tokens that a step has been trained on."""
    found: set[int] = set()
    for line in (run / FOLDER / f"step_{step:06}.jsonl").read_text().splitlines():
        found.update(json.loads(line)["versions"])
    return found


@pytest.mark.parametrize(
    ("staleness", "world", "parallel"),
    [(0, 1, {}), (1, 2, {"pp": 2})],
    ids=["newest", "stale pp2"],
)
def test_a_model_learns_from_what_servers_sample(
    staleness: int, world: int, parallel: dict[str, Any], server: Server, client: Client,
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(VARIABLE, TOKEN)
    config = rl_config(
        tiny, write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run",
        {"clip_high": 0.28, "proximal": "current"},
        rl={"rewards": f"{rewards.__file__}:digits", "group_size": 8, "reward_workers": 1,
            "servers": [server.url], "staleness": staleness, "concurrency": 128},
        lora=LoRAConfig(rank=16, alpha=32), parallel=parallel, steps=6, lr=7e-3, eval=1,
        global_batch_size=64, micro_batch_size=16, data={"eval": None},
    )  # fmt: skip
    named = CheckpointConfig(dir=str(tmp_path / "run"), serve_name=f"digits{staleness}")
    config = replace(config, checkpoint=named)
    run_ranks(train_and_judge, world, config)
    means = records(tmp_path / "run", "reward")
    assert max(means) > 2 * means[0]
    # The name that requests give means the newest version that was sampled from.
    assert client.resolve(f"digits{staleness}").startswith(f"digits{staleness}@v5.")
    of_steps = [versions(tmp_path / "run", step) for step in range(6)]
    gaps = records(tmp_path / "run", "engine_gap")
    if staleness == 0:
        assert of_steps == [{step} for step in range(6)]
        # vLLM with the adapter of the step computes what training does.
        assert max(gaps) < 5e-6
        return
    for step, found in enumerate(of_steps):
        assert found <= {step - 1, step}
    # Servers have sampled meanwhile.
    assert any(step - 1 in found for step, found in enumerate(of_steps))
    assert max(records(tmp_path / "run", "staleness_max")) == 1
