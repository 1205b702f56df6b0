"""Show with vLLM that what users of other programs have met does not happen here: the table is in
``tests/rl/test_complaints.py``, whose numbers these tests have."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.files import WEIGHTS
from megalora.adapters.write.form import adapter_contents
from megalora.config import CheckpointConfig, LoRAConfig, RunConfig
from megalora.hf.json_file import read_json_object
from megalora.serve.errors import AdapterNotFound
from megalora.serve.live.address import TOKEN as VARIABLE
from megalora.serve.live.message import Form, build_message
from megalora.serve.live.publisher import Transport
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from recipes.grpo import rewards
from tests.distributed.ranks import run_ranks
from tests.parity.built import built, whole_adapter
from tests.parity.runs import make_config, records
from tests.rl.played import rl_config, train_and_judge, write_prompts
from tests.serve.conftest import TOKEN
from tests.serve.test_live import PROMPT, answer, publisher_of, trained

pytestmark = pytest.mark.vllm
LORAS: dict[str, dict[str, Any]] = {
    # alpha / rank is no power of two, so that scaling twice, or in another dtype, shows.
    "plain": {"rank": 4, "alpha": 6.0},
    "patterns": {
        "rank": 4, "alpha": 12.0, "use_rslora": True,
        "rank_pattern": {"q_proj": 3, "down_proj": 5, "gate": 2}, "alpha_pattern": {"up_proj": 7.0},
    },
}  # fmt: skip


def test_02_the_newest_id_answers_and_the_one_before_is_gone(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    with publisher_of(server, keep=1) as publisher:
        before = ""
        said: list[Any] = []
        for version in range(4):
            made = trained(tmp_path / str(version), tiny, 80 + version)
            ident = publisher.publish(version, made.tensors, made.config)
            said.append(answer(client, ident, 4))
            # The plain name, too, from the first request on.
            assert answer(client, "rl", 4) == said[-1]
            if before:
                with pytest.raises(AdapterNotFound):
                    answer(client, before, 1)
            before = ident
        assert len({str(one) for one in said}) == 4


@pytest.mark.parametrize("lora", LORAS)
def test_03_every_transport_and_form_equals_a_folder(
    server: Server, client: Client, tiny: Path, tmp_path: Path, lora: str
) -> None:
    made = trained(tmp_path / "made", tiny, 7, **LORAS[lora])
    by_folder = client.load("folder", made.folder)
    expected = answer(client, by_folder)
    probe = client.prompt_logprobs(by_folder, PROMPT)
    assert expected != answer(client, str(server.base))
    ways: list[tuple[Transport, Form]] = [
        ("http", "per_expert"), ("http", "packed"), ("group", "per_expert"), ("group", "packed"),
        ("folder", "per_expert"),
    ]  # fmt: skip
    for number, (transport, form) in enumerate(ways):
        options = {"transport": transport, "form": form, "folder": tmp_path / "shared"}
        with publisher_of(server, **options) as publisher:
            ident = publisher.publish(number, made.tensors, made.config)
            assert ident.startswith(f"rl@v{number}.")
            # The log-probabilities of a first answer, which nothing has in a cache yet.
            assert client.prompt_logprobs(ident, PROMPT) == probe, (transport, form)
            assert answer(client, ident) == expected, (transport, form)
            assert client.resolve("rl") == ident
        client.unload("rl")


def contents_of(
    config: RunConfig, weights: Path
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What the first rank publishes of an adapter that this layout holds; a rank function."""
    with built(config, weights) as run:
        whole = whole_adapter(run)
        if whole is None:
            return None
        model = run.model
        tensors, peft, _ = adapter_contents(model.adapted, model.shape, whole, config.model.path)
        return tensors, peft


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"ep": 2}),
    "tp2 ep2": (2, {"tp": 2, "ep": 2}),
    "tp2 etp2": (2, {"tp": 2, "etp": 2}),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}),
}


def test_04_every_layout_and_form_loads(
    server: Server, client: Client, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    lora = LoRAConfig(rank=4, alpha=6.0)
    made = trained(tmp_path / "made", tiny, 0, target_modules=lora.target_modules)
    save_file(made.factors, tmp_path / "start.safetensors")
    probe = client.prompt_logprobs(client.load("folder", made.folder), PROMPT)
    for name, (world, parallel) in LAYOUTS.items():
        config = make_config(tiny, chats, tmp_path / name, parallel, lora=lora)
        tensors, peft = run_ranks(contents_of, world, config, tmp_path / "start.safetensors")[0]
        forms: tuple[Form, ...] = ("per_expert", "packed")
        for form in forms:
            with publisher_of(server, form=form) as publisher:
                ident = publisher.publish(0, tensors, peft)
                assert client.prompt_logprobs(ident, PROMPT) == probe, (name, form)
            client.unload("rl")


def test_08_the_fifth_version_is_the_checkpoint_under_pipeline_parallelism(
    server: Server, client: Client, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hash for hash; what was sampled from it computes what training does."""
    monkeypatch.setenv(VARIABLE, TOKEN)
    run = tmp_path / "run"
    config = rl_config(
        tiny, write_prompts(tmp_path / "prompts.jsonl"), run,
        {"proximal": "current"},
        rl={"rewards": f"{rewards.__file__}:digits", "reward_workers": 1,
            "servers": [server.url]},
        parallel={"pp": 2}, steps=5, lr=1e-2, eval=1, data={"eval": None},
    )  # fmt: skip
    named = CheckpointConfig(dir=str(run), every=1, serve_name="fifth")
    run_ranks(train_and_judge, 2, replace(config, checkpoint=named))
    served = [found.id for found in client.list() if found.name == "fifth"]
    # Version 0 came first, so these are the fourth and the fifth.
    expected = []
    for version in (3, 4):
        folder = run / f"step_{version:06}"
        peft = read_json_object(folder / "adapter_config.json")
        message = build_message(f"v{version}", load_file(folder / WEIGHTS), peft)
        expected.append(message.id_of("fifth"))
    assert served == expected
    assert max(records(run, "engine_gap")) < 5e-6
