"""Ask for adapters by the plain names that users chose: which version answers, before, during and
after swaps, and what an unknown name is told."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from megalora.serve.adapter_names import versioned
from megalora.serve.vllm import Client
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.names import name_of, newest
from tests.serve.fake_vllm import BASE, FakeVLLM, answer_of
from tests.serve.vllm_handlers import NamedModels, NamedServing, result
from tests.waiting import PATIENCE_S


@pytest.fixture
def client(vllm: FakeVLLM) -> Iterator[Client]:
    with Client(vllm.url, timeout=PATIENCE_S) as client:
        yield client


def ask(vllm: FakeVLLM, model: str | None) -> httpx.Response:
    """A request of somebody who has no client of ours."""
    body = {"model": model, "prompt": [5, 3]}
    return httpx.post(f"{vllm.url}/v1/completions", json=body, trust_env=False)


def test_the_version_loaded_last_has_the_name() -> None:
    loaded = dict.fromkeys(["math@1", "maths@1", "math@step_2.9", "prose", "x@y@3"])
    assert newest(loaded, "math") == "math@step_2.9"
    assert newest(loaded, "maths") == "maths@1"
    # Whole ids mean themselves, and so does what somebody loaded under a plain name.
    for model in loaded:
        assert newest(loaded, model) == model
    # VERSION has no @, but NAME may.
    assert newest(loaded, "x@y") == "x@y@3"
    for unknown in ("mat", "x", "math@", "1", "", None):
        assert newest(loaded, unknown) is None
    assert name_of("prose") is None


def test_a_plain_name_is_answered_by_its_newest_version(
    client: Client, vllm: FakeVLLM, adapters: list[Path]
) -> None:
    client.load("other", adapters[2])
    for adapter in (adapters[0], adapters[1], adapters[0]):
        model = client.swap("math", adapter)
        answer = ask(vllm, "math").json()
        # The answer says which version it is from.
        assert answer["model"] == model
        assert answer["choices"][0]["token_ids"] == answer_of(adapter)
    # An older version beside the newest one is asked by its id.
    newer = client.load("math", adapters[1])
    assert ask(vllm, "math").json()["model"] == newer
    assert ask(vllm, model).json()["model"] == model
    # Neither the base nor a request without a model is an adapter's.
    for base in (BASE, None, ""):
        assert ask(vllm, base).json()["model"] == BASE


def test_a_swap_between_accepting_and_answering_loses_nothing(
    client: Client, vllm: FakeVLLM, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = client.load("math", adapters[0])
    swapped = []
    monkeypatch.setattr(
        vllm, "before_binding", lambda: swapped.append(client.swap("math", adapters[1]))
    )
    answer = ask(vllm, "math")
    assert (answer.status_code, answer.json()["model"]) == (200, swapped[0])
    # Who pinned the version that went does not get another.
    monkeypatch.setattr(vllm, "before_binding", lambda: client.swap("math", adapters[0]))
    assert ask(vllm, swapped[0]).status_code == 404
    assert ask(vllm, "math").json()["model"] == old


def test_an_unknown_name_is_told_what_there_is(
    client: Client, vllm: FakeVLLM, adapters: list[Path]
) -> None:
    first = client.load("math", adapters[0])
    second = client.load("math", adapters[1])
    answer = ask(vllm, "maths")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == (
        f"The model `maths` does not exist. Valid aliases: {BASE}, math, {first}, {second}."
    )


def test_names_are_listed_and_are_no_versions(
    client: Client, vllm: FakeVLLM, adapters: list[Path]
) -> None:
    client.load("math", adapters[0])
    second = client.load("math", adapters[1])
    # Loaded by something else, without a version.
    client.api.load_adapter("prose", str(adapters[2]))
    cards = httpx.get(f"{vllm.url}/v1/models", trust_env=False).json()["data"]
    ids = [card["id"] for card in cards]
    assert ids == [BASE, "math", versioned("math", adapters[0]), second, "prose"]
    # The name stands for a folder, too: the newest version's.
    assert (cards[1]["parent"], cards[1]["root"]) == (second, str(adapters[1].resolve()))
    assert client.names() == {"math": second}
    # To our client a name is not another adapter, which it would unload or count.
    assert [served.id for served in client.list()] == [BASE, *ids[2:]]
    vllm.knows_names = False
    assert client.names() == {}


def test_the_base_keeps_its_name_and_requests_are_not_changed() -> None:
    serving = NamedServing(NamedModels("math", "/base", {"math@1": ("/one", 1), "x@1": ("/x", 2)}))
    # An adapter called like the base would never be meant.
    assert result(serving._check_model(SimpleNamespace(model="math"))) is None
    assert serving._maybe_get_adapters(SimpleNamespace(model="math")) is None
    # The request is looked up twice, so that it must keep its name.
    request = SimpleNamespace(model="x", messages=[{"role": "user", "content": "?"}])
    assert result(serving._check_model(request)) is None
    assert serving._maybe_get_adapters(request, supports_default_mm_loras=True) == ("/x", 2)
    assert request == SimpleNamespace(model="x", messages=[{"role": "user", "content": "?"}])
    listed = result(serving.models.show_available_models()).data
    assert [card.id for card in listed] == ["math", "x", "math@1", "x@1"]
