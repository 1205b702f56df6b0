"""Refuse adapters and names before the server hears of them, and give everything that a server
refuses its type."""

from pathlib import Path

import pytest
import torch

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
from tests.named_tensors import cast
from tests.serve.adapters import make_adapter
from tests.serve.fake_vllm import BASE, FakeVLLM, client, names

__all__ = ["client"]  # a fixture

PROMPT = [5, 3, 2]


def test_an_adapter_is_checked_before_the_server_hears_of_it(
    client: Client, vllm: FakeVLLM, adapters: list[Path], tmp_path: Path, tiny: Path
) -> None:
    good = client.load("math", adapters[0])
    with pytest.raises(AdapterNotFound):
        client.swap("math", tmp_path)
    with pytest.raises(AdapterInvalid):
        client.swap("math", cut_short(tmp_path / "cut", tiny))
    # Limits that the server was started with; the rank is looked at first.
    limited = Client(vllm.url, limits=Limits(max_rank=2, target_modules=("o_proj",)))
    with pytest.raises(AdapterRankTooLarge):
        limited.load("other", adapters[0])
    with pytest.raises(AdapterTargetsUnserved):
        Client(vllm.url, limits=Limits(target_modules=("o_proj",))).load("other", adapters[0])
    # The old version stays, and it alone was ever sent.
    assert names(vllm) == [good]
    assert vllm.calls == [("load", good)]


def test_another_server_is_named(vllm: FakeVLLM) -> None:
    """As where a user gives the address that OpenAI's clients want."""
    with (
        Client(f"{vllm.url}/v1") as client,
        pytest.raises(
            RequestRefused, match=f"{vllm.url}/v1 has no /v1/models; is it another server"
        ),
    ):
        client.list()


def cut_short(folder: Path, base: Path) -> Path:
    """An adapter whose weights did not arrive whole."""
    make_adapter(folder, base, 0, target_modules=["q_proj"])
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64])
    return folder


def test_the_base_is_looked_up_on_the_server(
    client: Client, vllm: FakeVLLM, tiny_dense: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """The server names its base's folder, which is looked at if it can be read from here."""
    vllm.base_path = str(tiny_dense)
    # Trained on the MoE, but q_proj of both bases has one size.
    client.load("attention", adapters[0])
    dense = make_adapter(tmp_path / "dense", tiny_dense, 0, target_modules=["down_proj"])
    client.load("dense", dense)
    # Out of reach: left to the server.
    vllm.base_path = "Qwen/Qwen3-30B-A3B"
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
    load = client.api.load_adapter

    def load_and_change(model: str, path: str) -> None:
        load(model, path)
        # Other tensors: which of the two did vLLM read?
        edit_tensors(folder, cast(torch.float16))

    monkeypatch.setattr(client.api, "load_adapter", load_and_change)
    with pytest.raises(AdapterInvalid, match="changed while it was being loaded"):
        client.load("math", folder)
    assert not names(vllm)


def test_what_the_server_finds_itself(client: Client, vllm: FakeVLLM, adapters: list[Path]) -> None:
    # Without limits of its own the client leaves ranks to vLLM, whose sentence tells the type.
    vllm.loading_fails = "LoRA rank 4 is greater than max_lora_rank 1."
    with pytest.raises(
        AdapterRankTooLarge,
        match=r"loading math@\w+: LoRA rank 4 is greater .*; start the server with a larger",
    ):
        client.load("math", adapters[0])
    # A bare assertion inside vLLM has no message.
    vllm.loading_fails = ""
    with pytest.raises(
        AdapterInvalid, match="vLLM cannot read it: no reason given; see the server log"
    ):
        client.load("math", adapters[0])


# @ stands before a version, and names become folders of a store and flags of vLLM.
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
    # Port 9, "discard", is nobody's on machines of today.
    client = Client("http://127.0.0.1:9", timeout=2)
    assert not client.health()
    message = r"http://127.0.0.1:9 does not answer .*; is the server running"
    with pytest.raises(ServerUnreachable, match=message):
        client.list()
    with pytest.raises(ServerUnreachable, match=message):
        client.load("math", adapters[0])
    with pytest.raises(ServerUnreachable, match=message):
        client.complete(BASE, PROMPT)


def test_an_answer_that_takes_too_long(vllm: FakeVLLM) -> None:
    vllm.may_answer.clear()
    with (
        Client(vllm.url, timeout=0.2) as client,
        pytest.raises(ServerUnreachable, match="no answer .* in time"),
    ):
        client.complete(BASE, PROMPT)
    # So that the server's thread ends.
    vllm.may_answer.set()


def test_a_connection_that_is_closed_under_a_request(
    client: Client, vllm: FakeVLLM, adapters: list[Path]
) -> None:
    # A connection is open now, which the server may close at any time, as HTTP allows.
    assert client.health()
    vllm.hang_up = 1
    # Asking again changes nothing; loading again would be refused if the first had arrived.
    assert client.complete(BASE, PROMPT).tokens == [0]
    vllm.hang_up = 1
    with pytest.raises(ServerUnreachable, match="closed the connection"):
        client.load("math", adapters[0])


# Answers of vLLM 0.32, of our plug-in in it, and of proxies in front of it. vLLM has one type for
# nearly all of its errors, so that sentences must tell them apart.
@pytest.mark.parametrize(
    ("status", "body", "loading", "expected"),
    [
        # An error of a worker process, which vLLM wraps in two sentences and quotes.
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
        # The engine has died: no adapter's fault.
        (
            500,
            '{"error": {"message": "EngineCore encountered an issue.", "type": "x"}}',
            True,
            ServerError,
        ),
        (500, '{"error": {"message": "boom", "type": "x"}}', False, ServerError),
        (503, "", True, ServerError),
        (502, "<html>Bad Gateway</html>", False, ServerError),
        # Without VLLM_ALLOW_RUNTIME_LORA_UPDATING vLLM has no such route.
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
    # A ValueError is a line and no traceback on the command line.
    assert type(error) is expected and isinstance(error, ValueError)
    said = str(error)
    assert said.startswith("loading math@1: ") and "\n" not in said
    # vLLM's advice to look at the stack trace above means its own log.
    assert "stack trace" not in said
