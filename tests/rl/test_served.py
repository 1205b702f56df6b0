"""Learn from what servers sample, each step by the version that it should be; with a server that
answers as vLLM does and computes nothing. ``tests/serve/test_rl.py`` has vLLM itself."""

import itertools
from pathlib import Path

import pytest

from megalora.rl.rollouts import FOLDER
from megalora.serve.live import publisher
from megalora.serve.live.address import TOKEN, TRAINER
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.arrival import Arrivals
from tests.distributed.ranks import run_ranks
from tests.jsonl import column, read_jsonl
from tests.rl.played import rl_config, train_by_ids, write_prompts
from tests.serve.fake_vllm import fake_vllm

STEPS = 3


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_each_step_is_sampled_by_its_version(
    staleness: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRAINER, "http://127.0.0.1")
    monkeypatch.setenv(TOKEN, "secret")
    # Its answers are a hash's bytes: neither the probe nor the gap can be the training's.
    monkeypatch.setattr(publisher, "agrees", lambda proof: True)
    (tmp_path / "arrived").mkdir()
    with fake_vllm(str(tiny)) as vllm:
        vllm.arrivals = Arrivals(tmp_path / "arrived")
        rl = {"servers": [vllm.url], "staleness": staleness, "largest_gap": 1e3}
        prompts = write_prompts(tmp_path / "prompts.jsonl")
        config = rl_config(
            tiny, prompts, tmp_path / "run", steps=STEPS, rl=rl, eval=1, data={"eval": None}
        )
        run_ranks(train_by_ids, 1, config)
        asked = set()
        for body in vllm.asked:
            # The probe's answers are not streamed. NAME@vN.HASH
            if body.get("stream"):
                asked.add(int(body["model"].partition("@v")[2].partition(".")[0]))
    for step in range(STEPS):
        rows = read_jsonl(tmp_path / "run" / FOLDER / f"step_{step:06}.jsonl")
        # The first of the rounds that are begun early has nothing but the start. A group that is
        # begun late, on a busy machine, has what has been published by then.
        versions = set(itertools.chain(*column(rows, "versions")))
        assert versions <= set(range(max(0, step - staleness), step + 1)), versions
    # So the server was asked; with staleness, by the last one for a round that none has taken.
    assert asked == set(range(STEPS))
