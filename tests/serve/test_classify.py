"""Serve a classifier by vLLM as its card says, and compare its scores with PEFT's."""

import json
import shlex
from pathlib import Path

import httpx
import pytest
import torch

from megalora.adapters.export import export
from megalora.serve.server import Server
from tests.adapters.test_score import in_peft, write
from tests.environment import OUTSIDE
from tests.peft_warnings import IGNORED
from tests.serve.adapters import tokens_of

pytestmark = [pytest.mark.vllm, IGNORED]
PROMPTS = [tokens_of(seed, length) for seed, length in ((1, 7), (2, 12), (3, 24))]


def test_a_served_classifier_gives_the_scores_of_peft(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    write(folder, tiny)
    export(folder, tmp_path / "mine", engine="vllm")
    card = (tmp_path / "mine" / "README.md").read_text()
    # One command over two lines.
    command = card.split("```bash\n")[1].split("\ncurl")[0].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[:3] == ["vllm", "serve", str(tiny)]
    options = words[3 : words.index("--enable-lora")]
    module = json.dumps({"name": "mine", "path": str(tmp_path / "mine")})
    extra = [*options, "--lora-modules", module]
    env = {"CUDA_VISIBLE_DEVICES": OUTSIDE.get("CUDA_VISIBLE_DEVICES")}
    log = tmp_path / "vllm.log"
    with Server(tiny, max_rank=4, max_loras=1, extra=extra, env=env, log=log) as server:
        asked = {"model": "mine", "input": PROMPTS, "use_activation": False}
        answer = httpx.post(f"{server.url}/classify", json=asked, timeout=120)
        assert answer.status_code == 200, answer.text
        base = httpx.post(f"{server.url}/classify", json=asked | {"model": str(tiny)}, timeout=120)
    ours = torch.tensor([row["probs"] for row in answer.json()["data"]])
    model = in_peft(tiny, folder)
    expected = []
    with torch.no_grad():
        for prompt in PROMPTS:
            expected.append(model(input_ids=torch.tensor([prompt])).logits[0])
    # float32 on both sides, of scores of about 1.
    assert (ours - torch.stack(expected)).abs().max() < 2e-5
    assert torch.stack(expected).abs().max() > 0.3
    # The base's own head is not trained, and gives something else.
    without = torch.tensor([row["probs"] for row in base.json()["data"]])
    assert (ours - without).abs().max() > 0.1
