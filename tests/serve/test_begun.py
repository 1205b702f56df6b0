"""vLLM serves an adapter that began as a part of the base: PiSSA changes the base in PEFT, and no
server would; our files are plain LoRA on the base as published."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalora.adapters.export import export
from megalora.config import LoRAConfig
from megalora.serve.proof import prove
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from megalora.train.loop import train
from tests.adapters.folders import edit_config
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config
from tests.peft_warnings import IGNORED

pytestmark = [pytest.mark.vllm, IGNORED]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_was_trained_is_served(
    init: str, server: Server, client: Client, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """By the log-probabilities that training recorded; on attention and experts."""
    lora = LoRAConfig(rank=4, alpha=12.0, init=init)
    config = make_config(tiny, chats, tmp_path / "run", {"ep": 2}, lora=lora, steps=3, lr=5e-3)
    run_ranks(train, 2, replace(config))
    export(tmp_path / "run/step_000003", tmp_path / "out", engine="vllm")
    client.load(init, tmp_path / "out")
    found = prove(client, init, tmp_path / "out")
    assert found.ok and found.effect > 0.01, found.text()
    # The scale of the trained rank, on the file's of twice as much, is seen.
    edit_config(tmp_path / "out", lora_alpha=12)
    client.load("half", tmp_path / "out")
    assert not prove(client, "half", tmp_path / "out").ok
