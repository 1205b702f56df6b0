"""The run of ``make quickstart-rl``, shorter: vLLM is started by it, gets each step's adapter, and
is gone behind it."""

import re
from pathlib import Path

import httpx
import pytest

from megalora.config.file import load_config
from megalora.rl import own_servers
from megalora.serve.server import Server
from recipes.sums import base
from tests.distributed.ranks import run_ranks
from tests.parity.runs import records
from tests.rl.played import train_and_judge
from tests.serve.conftest import VLLM_ENVIRONMENT
from tests.serve.test_rl import versions

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
STEPS = 3


class InCheckout(Server):
    """With the plug-in of this checkout, wherever the one that is installed lies."""

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "PYTHONPATH": str(VLLM_ENVIRONMENT["PYTHONPATH"])}


def test_a_run_samples_from_a_server_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.main(tmp_path, steps=60)
    config = load_config(
        ROOT / "recipes/sums/train.yaml",
        [f"model.path={tmp_path}/base", f"data.train={tmp_path}/prompts.jsonl",
         f"checkpoint.dir={tmp_path}/run", f"train.steps={STEPS}"],
    )  # fmt: skip
    monkeypatch.setattr(own_servers, "Server", InCheckout)
    run_ranks(train_and_judge, 1, config)
    run = tmp_path / "run"
    for step in range(STEPS):
        assert versions(run, step) == {step}
    # In float32 nothing but rounding lies between vLLM and training.
    assert max(records(run, "engine_gap")) < 5e-6
    log = (run / "servers/0.log").read_text()
    (url,) = re.findall(r"Starting vLLM server on (http://\S+)", log)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
