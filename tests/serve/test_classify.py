"""Serve classifiers: what vLLM is started with, what is refused, and scores equal to PEFT's."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.export import export
from megalora.adapters.files import CONFIG, PROBE, WEIGHTS
from megalora.serve.check import Limits, check_adapter
from megalora.serve.errors import (
    AdapterForOtherBase,
    AdapterInvalid,
    AdapterTargetsUnserved,
    RequestRefused,
)
from megalora.serve.heads import SCORE_WEIGHT
from megalora.serve.proof import prove
from megalora.serve.run import request_to_try
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from tests.adapters.folders import edit_config, edit_tensors
from tests.adapters.test_score import in_peft, write
from tests.environment import OUTSIDE
from tests.named_tensors import Tensors
from tests.peft_warnings import IGNORED
from tests.serve.adapters import make_adapter, tokens_of
from tests.serve.fake_vllm import fake_vllm

pytestmark = IGNORED
PROMPTS = [tokens_of(seed, length) for seed, length in ((1, 7), (2, 12), (3, 24))]


@pytest.fixture
def classifier(tiny: Path, tmp_path: Path) -> Path:
    """An adapter of attention and experts with a head of three scores, exported for vLLM."""
    folder = tmp_path / "trained"
    folder.mkdir()
    write(folder, tiny)
    export(folder, tmp_path / "mine", engine="vllm")
    return tmp_path / "mine"


def options_of(command: list[str]) -> list[str]:
    """What a command line says of the kind of model."""
    start = command.index("--runner")
    return command[start : start + 6]


def test_vllm_is_started_as_the_card_says(classifier: Path, tiny: Path) -> None:
    server = Server(tiny, {"mine": classifier}, python=sys.executable)
    card = (classifier / "README.md").read_text()
    # One command over two lines.
    said = card.split("```bash\n")[1].split("\ncurl")[0].replace("\\\n", " ")
    assert options_of(server.command()) == options_of(shlex.split(said))
    assert server.limits.num_scores == 3
    assert check_adapter(classifier, server.limits).num_scores == 3


def test_one_server_has_one_kind_of_head(classifier: Path, tiny: Path, tmp_path: Path) -> None:
    plain = make_adapter(tmp_path / "plain", tiny, 1)
    said = (
        f"{plain} is a language model, and the server is for a classifier of 3 scores. Serve it by"
        " a megalora serve of its own"
    )
    with pytest.raises(AdapterTargetsUnserved) as caught:
        Server(tiny, {"mine": classifier, "plain": plain}, python=sys.executable)
    assert str(caught.value) == said
    with pytest.raises(AdapterTargetsUnserved, match="is a classifier of 3 scores, and the server"):
        check_adapter(classifier, Limits(num_scores=2))
    assert "--runner" not in Server(tiny, {"plain": plain}, python=sys.executable).command()


def without_head(tensors: Tensors) -> Tensors:
    del tensors[SCORE_WEIGHT]
    return tensors


def narrow_head(tensors: Tensors) -> Tensors:
    tensors[SCORE_WEIGHT] = tensors[SCORE_WEIGHT][:, 1:].contiguous()
    return tensors


def flat_head(tensors: Tensors) -> Tensors:
    tensors[SCORE_WEIGHT] = tensors[SCORE_WEIGHT].flatten()
    return tensors


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (without_head, AdapterInvalid, "has no base_model.model.score.weight, which"),
        (narrow_head, AdapterForOtherBase, "is 3 x 95, and the base model's hidden size is 96"),
        (flat_head, AdapterInvalid, "must be a matrix of floats"),
    ],
)
def test_heads_that_are_refused(
    classifier: Path, tiny: Path, change: Any, error: type[Exception], said: str
) -> None:
    edit_tensors(classifier, change)
    with pytest.raises(error, match=said):
        check_adapter(classifier, Limits(base=tiny))


def test_what_was_trained_whole_beside_a_head_is_refused(classifier: Path, tiny: Path) -> None:
    edit_config(classifier, modules_to_save=["score", "embed_tokens"])
    with pytest.raises(AdapterInvalid, match="vLLM does not serve modules_to_save"):
        check_adapter(classifier, Limits(base=tiny))


def test_a_server_of_language_models_gives_no_scores(tiny: Path) -> None:
    said = "gives no scores. Classifiers need a server of their own"
    with (
        fake_vllm(str(tiny)) as vllm,
        Client(vllm.url) as client,
        pytest.raises(RequestRefused, match=said),
    ):
        client.scores("the-base", [1, 2, 3])


def test_a_request_for_scores_to_try() -> None:
    words = shlex.split(request_to_try("http://h:1", "mine", chat=True, key=False, scores=True))
    assert words[1] == "http://h:1/classify"
    assert json.loads(words[-1]) == {
        "model": "mine", "input": "What is 6 times 7?", "use_activation": False,
    }  # fmt: skip


def scores_in_peft(base: Path, folder: Path) -> torch.Tensor:
    """[prompts, 3]"""
    model = in_peft(base, folder)
    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            found.append(model(input_ids=torch.tensor([prompt])).logits[0])
    return torch.stack(found)


def with_probe(folder: Path, scores: list[float]) -> Path:
    """The folder with what training would have written of its scores."""
    probe = {"tokens": PROMPTS[0], "scores": scores, "dtype": "float32"}
    (folder / PROBE).write_text(json.dumps(probe))
    return folder


def shifted(folder: Path, to: Path) -> Path:
    """A copy of the adapter with another head."""
    to.mkdir()
    (to / CONFIG).write_text((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    tensors[SCORE_WEIGHT] = tensors[SCORE_WEIGHT].flip(0).contiguous()
    save_file(tensors, to / WEIGHTS)
    return to


@pytest.mark.vllm
def test_served_classifiers_give_the_scores_of_peft(
    classifier: Path, tiny: Path, tmp_path: Path
) -> None:
    expected = scores_in_peft(tiny, tmp_path / "trained")
    with_probe(classifier, expected[0].tolist())
    env = {"CUDA_VISIBLE_DEVICES": OUTSIDE.get("CUDA_VISIBLE_DEVICES")}
    log = tmp_path / "vllm.log"
    with Server(tiny, {"mine": classifier}, env=env, log=log) as server, server.client() as client:
        ours = torch.tensor([client.scores("mine", prompt) for prompt in PROMPTS])
        # float32 on both sides, of scores of about 1.
        assert (ours - expected).abs().max() < 2e-5
        assert expected.abs().max() > 0.3
        found = prove(client, "mine", classifier)
        assert found.ok and "moves scores of the probe text" in found.text()
        # The head that vLLM draws for a base without one gives something else.
        assert found.effect > 0.1
        # Another head over the same adapter, with the probe of the first one, and with its own.
        other = with_probe(shifted(classifier, tmp_path / "other"), expected[0].tolist())
        client.swap("mine", other)
        assert not prove(client, "mine", other).ok
        with_probe(other, expected[0].flip(0).tolist())
        assert prove(client, "mine", other).ok
        with pytest.raises(RequestRefused, match="gives no completions"):
            client.complete("mine", PROMPTS[0])
