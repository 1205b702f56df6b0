"""What the client refuses by itself, and the type of everything that a server refuses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megalora.adapters.files import WEIGHTS
from megalora.serve.check import Limits
from megalora.serve.errors import (
    AdapterForOtherBase,
    AdapterInvalid,
    AdapterNameTaken,
    AdapterNotFound,
    AdapterRankTooLarge,
    AdapterTargetsUnserved,
    RequestRefused,
    RuntimeUpdatesOff,
    ServeError,
    ServerError,
    ServerUnreachable,
    refusal,
)
from megalora.serve.vllm import Client
from tests.adapters.folders import edit_tensors
from tests.serve.adapters import make_adapter
from tests.serve.fake_vllm import BASE, FakeVLLM, names
from tests.waiting import PATIENCE_S

PROMPT = [5, 3, 2]


@pytest.fixture
def client(vllm: FakeVLLM) -> Iterator[Client]:
    with Client(vllm.url, timeout=PATIENCE_S) as client:
        yield client


def test_an_adapter_is_checked_before_the_server_hears_of_it(
    client: Client, vllm: FakeVLLM, adapters: list[Path], tmp_path: Path, tiny: Path
) -> None:
    good = client.load("math", adapters[0])
    for broken, error in [
        (tmp_path, AdapterNotFound),
        (cut_short(tmp_path / "cut", tiny), AdapterInvalid),
    ]:
        with pytest.raises(error):
            client.swap("math", broken)
    # As a server says its limits, or as it was started.
    limited = Client(vllm.url, limits=Limits(max_rank=2, target_modules=("o_proj",)))
    with pytest.raises(AdapterRankTooLarge):
        limited.load("other", adapters[0])
    with pytest.raises(AdapterTargetsUnserved):
        Client(vllm.url, limits=Limits(target_modules=("o_proj",))).load("other", adapters[0])
    assert names(vllm) == [good], "the old version stays"
    # The good one alone was sent.
    assert [action for action, _ in vllm.calls] == ["load"]


def cut_short(folder: Path, base: Path) -> Path:
    make_adapter(folder, base, 0, target_modules=["q_proj"])
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64])
    return folder


def test_the_base_is_looked_up_on_the_server(
    client: Client, vllm: FakeVLLM, tiny_dense: Path, adapters: list[Path], tmp_path: Path
) -> None:
    vllm.base_path = str(tiny_dense)
    client.load("attention", adapters[0])  # q_proj of both bases has one size
    client.load(
        "dense", make_adapter(tmp_path / "dense", tiny_dense, 0, target_modules=["down_proj"])
    )
    vllm.base_path = "Qwen/Qwen3-30B-A3B"  # out of reach: left to the server
    client.load("unknown", adapters[1])


def test_an_adapter_for_another_base(
    client: Client, tiny: Path, tiny_dense: Path, tmp_path: Path
) -> None:
    dense = make_adapter(tmp_path / "dense", tiny_dense, 0, target_modules=["down_proj"])
    with pytest.raises(
        AdapterForOtherBase, match=r"has no model.layers.0.mlp.down_proj; was .* trained on .*dense"
    ):
        client.load("dense", dense)


def test_a_folder_that_changes_while_it_is_loaded(
    client: Client, vllm: FakeVLLM, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tmp_path / "a", tiny, 0, target_modules=["q_proj"])
    load = client._api.load_adapter

    def load_and_change(model: str, path: str) -> None:
        load(model, path)
        edit_tensors(folder, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})

    monkeypatch.setattr(client._api, "load_adapter", load_and_change)
    with pytest.raises(AdapterInvalid, match="changed while it was being loaded"):
        client.load("math", folder)
    assert not names(vllm)


def test_what_the_server_finds_itself(client: Client, vllm: FakeVLLM, adapters: list[Path]) -> None:
    vllm.loading_fails = "LoRA rank 4 is greater than max_lora_rank 1."
    with pytest.raises(
        AdapterRankTooLarge,
        match=r"loading math@\w+: LoRA rank 4 is greater .*; start the server with a larger",
    ):
        client.load("math", adapters[0])
    vllm.loading_fails = ""
    with pytest.raises(
        AdapterInvalid, match="vLLM cannot read it: no reason given; see the server log"
    ):
        client.load("math", adapters[0])


@pytest.mark.parametrize("name", ["", "a b", "math@3", "../x", "-x"])
def test_names(client: Client, adapters: list[Path], name: str) -> None:
    with pytest.raises(AdapterInvalid, match="must be letters, digits"):
        client.load(name, adapters[0])
    with pytest.raises(AdapterInvalid, match="adapter version"):
        client.load("math", adapters[0], version=name)


def test_the_base_s_name_is_taken(client: Client, adapters: list[Path]) -> None:
    # vLLM itself would answer with the base.
    with pytest.raises(AdapterNameTaken, match="the base model's name"):
        client.swap(BASE, adapters[0])


def test_a_server_that_takes_no_updates(
    client: Client, vllm: FakeVLLM, adapters: list[Path]
) -> None:
    vllm.updates_allowed = False
    with pytest.raises(RuntimeUpdatesOff, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        client.load("math", adapters[0])


def test_a_prompt_that_is_refused(client: Client) -> None:
    with pytest.raises(RequestRefused, match="maximum context length is 200"):
        client.complete(BASE, [1] * 201)


def test_nobody_answers(adapters: list[Path]) -> None:
    client = Client("http://127.0.0.1:9", timeout=2)
    assert not client.health()
    for call in (
        client.list,
        lambda: client.load("math", adapters[0]),
        lambda: client.complete(BASE, PROMPT),
    ):
        with pytest.raises(
            ServerUnreachable, match=r"http://127.0.0.1:9 does not answer .*; is the server running"
        ):
            call()


def test_an_answer_that_takes_too_long(vllm: FakeVLLM) -> None:
    vllm.may_answer.clear()
    with (
        Client(vllm.url, timeout=0.2) as client,
        pytest.raises(ServerUnreachable, match="no answer .* in time"),
    ):
        client.complete(BASE, PROMPT)
    vllm.may_answer.set()


def test_a_connection_that_is_closed_under_a_request(
    client: Client, vllm: FakeVLLM, adapters: list[Path]
) -> None:
    assert client.health()
    vllm.hang_up = 1
    assert client.complete(BASE, PROMPT).tokens == [0], "asked again"
    vllm.hang_up = 1
    with pytest.raises(ServerUnreachable, match="closed the connection"):
        client.load("math", adapters[0])  # loading twice would be refused


@pytest.mark.parametrize(
    ("status", "body", "loading", "expected"),
    [
        (
            500,
            (
                '{"error": {"message": "Call to add_lora method failed: Worker failed with error'
                ' \'no \'quoted\' such\', please check the stack trace above", "type": "x"}}'
            ),
            True,
            AdapterInvalid,
        ),
        (
            500,
            (
                '{"error": {"message": "Call to add_lora method failed: LoRA rank 9 is greater than'
                ' max_lora_rank 8.", "type": "InternalServerError"}}'
            ),
            True,
            AdapterRankTooLarge,
        ),
        (
            500,
            '{"error": {"message": "While loading /a, expected target modules", "type": "x"}}',
            True,
            AdapterInvalid,
        ),
        (500, '{"error": {"message": "", "type": "x"}}', True, AdapterInvalid),
        (
            500,
            '{"error": {"message": "EngineCore encountered an issue.", "type": "x"}}',
            True,
            ServerError,
        ),
        (500, '{"error": {"message": "boom", "type": "x"}}', False, ServerError),
        (503, "", True, ServerError),
        (502, "<html>Bad Gateway</html>", False, ServerError),
        (404, '{"detail":"Not Found"}', True, RuntimeUpdatesOff),
        (
            500,
            '{"error": {"message": "LoRA is not enabled. Use --enable-lora", "type": "x"}}',
            True,
            RuntimeUpdatesOff,
        ),
        (
            500,
            (
                '{"error": {"message": "nothing on this server uses the adapter\'s lm_head",'
                ' "type": "x"}}'
            ),
            True,
            AdapterTargetsUnserved,
        ),
        (
            404,
            (
                '{"error": {"message": "Loading lora a failed: No adapter found for /b", "type":'
                ' "NotFoundError"}}'
            ),
            True,
            AdapterNotFound,
        ),
        (401, '{"error": "Unauthorized"}', False, RequestRefused),
    ],
)
def test_refusals_by_type(
    status: int, body: str, loading: bool, expected: type[ServeError]
) -> None:
    error = refusal("loading math@1", status, body, loading=loading)
    assert type(error) is expected and isinstance(error, ValueError)
    assert (
        str(error).startswith("loading math@1: ")
        and "\n" not in str(error)
        and "stack trace" not in str(error)
    )
