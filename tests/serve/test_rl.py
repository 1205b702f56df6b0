"""Learn from what vLLM samples: each step from the adapter that it should."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.config import CheckpointConfig, LoRAConfig
from megalora.rl.kept_servers import keep_running
from megalora.rl.rollouts import FOLDER
from megalora.rl.scaled_logprobs import SCALED, check_scaled
from megalora.serve.errors import ServerError
from megalora.serve.live.address import TOKEN as VARIABLE
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from megalora.thread_work import in_thread
from recipes.grpo import rewards
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl
from tests.oracles.training import frozen
from tests.parity.runs import records
from tests.rl.played import rl_config, train_and_judge, write_prompts
from tests.serve.adapters import tokens_of
from tests.serve.conftest import TOKEN, VLLM_ENVIRONMENT
from tests.waiting import wait_until

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


def test_a_server_that_is_killed_is_waited_for_and_proved_again(
    server: Server, client: Client, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps, at a temperature; it comes back on the same port with nothing."""
    monkeypatch.setenv(VARIABLE, TOKEN)
    temperature = 0.6
    run = tmp_path / "run"
    said: list[str] = []
    # The server of other tests was started without the option.
    with pytest.raises(ServerError, match=r"factor 1, 4 is wanted.*--logprobs-mode"):
        check_scaled(client, str(server.base), tokens_of(0, 40))
    with (
        Server(
            tiny, max_rank=8, max_loras=3, extra=SCALED, env=VLLM_ENVIRONMENT,
            log=tmp_path / "vllm.log", trainer="http://127.0.0.1",
        ) as killed,
        keep_running([killed], said.append),
    ):  # fmt: skip
        config = rl_config(
            tiny, write_prompts(tmp_path / "prompts.jsonl"), run, {"temperature": temperature},
            rl={"rewards": f"{rewards.__file__}:digits", "group_size": 4, "max_new_tokens": 6,
                "reward_workers": 1, "servers": [killed.url]},
            lora=LoRAConfig(rank=8, alpha=16), steps=3, eval=1, data={"eval": None}, lr=5e-3,
            global_batch_size=16, micro_batch_size=16,
        )  # fmt: skip

        def kill() -> None:
            # Everything of the second round is sampled, and nothing of the third.
            wait_until((run / FOLDER / "step_000001.jsonl").exists)
            assert killed._process is not None
            os.killpg(killed._process.pid, signal.SIGKILL)

        killing = in_thread(kill, "kill")
        run_ranks(train_and_judge, 1, config)
        killing.result()
    assert "ended with exit code" in said[0] and "is ready again" in said[1]
    assert [versions(run, step) for step in range(3)] == [{0}, {1}, {2}]
    # The server that came back has the adapter of the third step.
    assert max(records(run, "engine_gap")) < 5e-6
    # Before the first step the adapter does nothing: plain transformers, at the temperature.
    model = frozen(tiny, torch.float64)
    for row in read_jsonl(run / FOLDER / "step_000000.jsonl"):
        count = len(row["completion_ids"])
        tokens = torch.tensor([*row["prompt_ids"], *row["completion_ids"]])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, -count - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, tokens[-count:, None])
        assert row["logprobs"] == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
