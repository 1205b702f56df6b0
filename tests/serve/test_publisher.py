"""Bring versions of an adapter to servers that behave like vLLM: in the right order, whole, and
only from the training that a server knows."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megalora.serve.errors import (
    AdapterInvalid,
    ServerError,
    ServerUnreachable,
    TrainerRefused,
)
from megalora.serve.live import broadcast
from megalora.serve.live.address import TOKEN, TRAINER, check_address, own_address
from megalora.serve.live.checks import acknowledged, agrees
from megalora.serve.live.publisher import Publisher
from megalora.serve.live.source import Source
from megalora.serve.proof import Proof
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.arrival import Arrivals
from megalora.thread_work import in_thread
from tests.serve.fake_vllm import FakeVLLM, fake_vllm, names
from tests.waiting import PATIENCE_S, wait_until

CONFIG: dict[str, Any] = {
    "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
}  # fmt: skip
E = 3
# Of the fake server: -token for each, and 0.25 less with an adapter.
PROBE = {"tokens": [4, 1, 2], "logprobs": [-1.25, -2.25], "dtype": "float32"}


def adapter(seed: int) -> dict[str, Tensor]:
    """An adapter of one layer; no two sizes are alike."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"gate_proj": (5, 7), "up_proj": (5, 7), "down_proj": (7, 5)}
    modules = {"self_attn.q_proj": (11, 7)}
    for expert in range(E):
        for leaf, size in sizes.items():
            modules[f"mlp.experts.{expert}.{leaf}"] = size
    tensors = {}
    for module, (out_features, in_features) in modules.items():
        name = f"base_model.model.model.layers.0.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, in_features, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out_features, 2, generator=generator)
    return tensors


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Server and training are in one process here, and have one environment."""
    monkeypatch.setenv(TRAINER, "http://127.0.0.1")
    monkeypatch.setenv(TOKEN, "secret")


@pytest.fixture
def servers(tiny: Path, tmp_path: Path) -> Iterator[list[FakeVLLM]]:
    with ExitStack() as stack:
        found = []
        for number in range(2):
            server = stack.enter_context(fake_vllm(str(tiny)))
            folder = tmp_path / f"arrivals-{number}"
            folder.mkdir()
            server.arrivals = Arrivals(folder)
            found.append(server)
        yield found


def publisher_of(servers: list[FakeVLLM], **options: Any) -> Publisher:
    return Publisher([server.url for server in servers], "rl", **options)


def numbers(server: FakeVLLM) -> list[str]:
    """Versions that it has, as vN."""
    return [name.split("@")[1].split(".")[0] for name in names(server)]


@pytest.mark.parametrize("transport", ["http", "group"])
def test_versions_come_to_all_servers_and_go_again(servers: list[FakeVLLM], transport: Any) -> None:
    with publisher_of(servers, keep=2, transport=transport) as publisher:
        assert publisher.current(servers[0].url) is None
        ids = []
        for version in range(5):
            ids.append(publisher.publish(version, adapter(version), CONFIG, PROBE))
            for server in servers:
                assert publisher.current(server.url) == version
                assert names(server)[-1] == ids[-1]
        for server in servers:
            # Oldest first; those before are unloaded, in this order.
            assert names(server) == ids[3:]
            unloaded = [ident for kind, ident in server.calls if kind == "unload"]
            assert unloaded == ids[:3]
            assert server.arrivals is not None
            # The last two files stay, for requests that still run.
            assert {place.name for place in server.arrivals.folder.iterdir()} == set(ids[1:])
        assert list(publisher.source.messages) == ids[3:]
        assert publisher.id_of(4) == ids[4]
        with pytest.raises(KeyError):
            publisher.id_of(0)
        assert [timing.load_s for timing in publisher.timings().values() if timing] == [0.25] * 2
        # The same contents again change nothing.
        calls = len(servers[0].calls)
        assert publisher.publish(4, adapter(4), CONFIG, PROBE) == ids[4]
        assert len(servers[0].calls) == calls


def test_going_back_to_an_older_version_makes_it_the_newest(servers: list[FakeVLLM]) -> None:
    with publisher_of(servers[:1]) as publisher:
        first = publisher.publish(0, adapter(0), CONFIG)
        second = publisher.publish(1, adapter(1), CONFIG)
        assert publisher.publish(0, adapter(0), CONFIG) == first
        assert names(servers[0]) == [second, first]
        assert publisher.current(servers[0].url) == 0


def test_a_version_in_use_stays(servers: list[FakeVLLM]) -> None:
    used = {0}
    with publisher_of(servers, keep=1, in_use=lambda: used) as publisher:
        for version in range(3):
            publisher.publish(version, adapter(version), CONFIG)
        assert numbers(servers[0]) == ["v0", "v2"]
        used.clear()
        publisher.publish(3, adapter(3), CONFIG)
        assert numbers(servers[0]) == ["v3"]


def test_it_is_unloaded_everywhere_before_it_is_dropped(servers: list[FakeVLLM]) -> None:
    with publisher_of(servers, keep=1) as publisher:
        old = publisher.publish(0, adapter(0), CONFIG)
        dropped_too_early = []
        unload = publisher.servers[1].unload

        def watched(ident: str) -> None:
            if ident not in publisher.source.messages:
                dropped_too_early.append(ident)
            unload(ident)

        publisher.servers[1].unload = watched  # type: ignore[method-assign]
        publisher.publish(1, adapter(1), CONFIG)
        assert not dropped_too_early
        assert [*publisher.source.messages] == [publisher.id_of(1)]
        assert old not in names(servers[1])


def test_a_server_that_was_started_again_catches_up(servers: list[FakeVLLM]) -> None:
    examined: list[str] = []
    examine = lambda client, ident: examined.append(f"{client.api.url} {ident}")  # noqa: E731
    with publisher_of(servers, examine=examine) as publisher:
        ids = [publisher.publish(version, adapter(version), CONFIG, PROBE) for version in (5, 6)]
        # Before its first version is in service.
        assert sorted(examined) == sorted(f"{server.url} {ids[0]}" for server in servers)
        # Everything is forgotten.
        servers[1].adapters.clear()
        asked = len(servers[1].asked)
        publisher.restore(servers[1].url)
        assert names(servers[1]) == ids
        assert publisher.current(servers[1].url) == 6
        # And proved again: the adapter and its base.
        assert len(servers[1].asked) == asked + 2
        assert examined[2:] == [f"{servers[1].url} {ids[1]}"]


def test_closing_does_not_wait_for_a_server_that_hangs(servers: list[FakeVLLM]) -> None:
    publisher = publisher_of(servers)
    servers[1].may_answer.clear()
    # Daemons, which no process waits for at its end.
    waiting = in_thread(lambda: publisher.publish(0, adapter(0), CONFIG, PROBE), "waits")
    wait_until(lambda: servers[1].asked)
    assert all(one.daemon for one in threading.enumerate() if one.name == "publish")
    closing = in_thread(publisher.close, "closes")
    # The server would not answer for ten minutes.
    assert closing.result(timeout=PATIENCE_S / 10) is None
    assert not waiting.done()
    servers[1].may_answer.set()
    with suppress(Exception):
        waiting.result()


def test_a_server_that_is_away_is_said_and_the_others_have_it(
    servers: list[FakeVLLM], tiny: Path
) -> None:
    with publisher_of(servers) as publisher:
        publisher.publish(0, adapter(0), CONFIG)
        url = servers[1].url
        # It dies with the request.
        servers[1].hang_up = 1
        with pytest.raises(ServerUnreachable, match=url):
            publisher.publish(1, adapter(1), CONFIG)
        assert numbers(servers[0]) == ["v0", "v1"]
        assert publisher.current(url) == 0
        # It is back, and has forgotten everything.
        servers[1].adapters.clear()
        publisher.publish(1, adapter(1), CONFIG)
        assert numbers(servers[1]) == ["v0", "v1"]
        assert publisher.current(url) == 1


def test_a_failed_broadcast_is_followed_by_http(
    servers: list[FakeVLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Receivers know of a sender that is gone by the time alone.
    monkeypatch.setattr(broadcast, "TIMEOUT_S", 1.0)
    with publisher_of(servers, transport="group") as publisher:
        publisher.publish(0, adapter(0), CONFIG)
        group = publisher._sender._group
        assert group is not None

        def broken(*_: Any) -> None:
            raise RuntimeError("connection closed by peer")

        monkeypatch.setattr(group, "send", broken)
        ident = publisher.publish(1, adapter(1), CONFIG)
        for server in servers:
            assert names(server)[-1] == ident
        # The next is a broadcast again, in a new group.
        publisher.publish(2, adapter(2), CONFIG)
        assert publisher._sender.epoch == 2


def test_a_version_that_one_server_refuses_behind_a_failed_broadcast_is_withdrawn(
    servers: list[FakeVLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for the other server, which does not answer, would be in vain."""
    monkeypatch.setattr(broadcast, "TIMEOUT_S", 1.0)
    with publisher_of(servers, transport="group") as publisher:
        kept = publisher.publish(0, adapter(0), CONFIG)
        bring = publisher._bring

        def broken(*_: Any) -> None:
            raise RuntimeError("connection closed by peer")

        def brought(server: Any, path_of: Any = None) -> None:
            # The first is gone before it is asked once more.
            if path_of is None and server.number == 0:
                raise ServerUnreachable(f"{server.url} does not answer")
            bring(server, path_of)

        monkeypatch.setattr(publisher._sender._group, "send", broken)
        monkeypatch.setattr(publisher, "_bring", brought)
        servers[1].loading_fails = "the rank is too large"
        with pytest.raises(AdapterInvalid, match="the rank is too large"):
            publisher.publish(1, adapter(1), CONFIG)
        assert names(servers[0]) == names(servers[1]) == [kept]
        assert list(publisher.source.messages) == [kept]


def test_only_the_training_that_a_server_knows(
    servers: list[FakeVLLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with publisher_of(servers[:1]) as publisher:
        for trainer, said in (
            (
                "http://10.0.0.5:4000",
                "takes adapters from http://10.0.0.5:4000 only, not 127.0.0.1",
            ),
            (f"http://127.0.0.1:{publisher.source.port + 1}", "only, not 127.0.0.1"),
            ("", "takes adapters from no training"),
        ):
            monkeypatch.setenv(TRAINER, trainer)
            with pytest.raises(TrainerRefused, match=said):
                publisher.publish(0, adapter(0), CONFIG)
        monkeypatch.setenv(TRAINER, f"http://127.0.0.1:{publisher.source.port}")
        monkeypatch.setenv(TOKEN, "another")
        with pytest.raises(TrainerRefused, match="refuses this server's token: both need the same"):
            publisher.publish(0, adapter(0), CONFIG)
        assert not names(servers[0])
        monkeypatch.setenv(TOKEN, "secret")
        publisher.publish(0, adapter(0), CONFIG)
    # A server without the plug-in takes the address for a folder.
    servers[0].arrivals = None
    with (
        publisher_of(servers[:1]) as publisher,
        pytest.raises(TrainerRefused, match="needs megalora's plug-in"),
    ):
        publisher.publish(1, adapter(1), CONFIG)
    # With a folder, it is loaded from there.
    with publisher_of(servers[:1], folder=tmp_path / "shared") as publisher:
        ident = publisher.publish(1, adapter(1), CONFIG)
        assert servers[0].adapters[ident][0] == str(tmp_path / "shared" / ident)


def test_what_a_server_does_otherwise_is_not_in_service(servers: list[FakeVLLM]) -> None:
    wrong = PROBE | {"logprobs": [-1.25, -2.2]}
    with publisher_of(servers) as publisher:
        with pytest.raises(ServerError, match="differs from the training side by up to 5.00e-02"):
            publisher.publish(0, adapter(0), CONFIG, wrong)
        assert publisher.current(servers[0].url) is None
        good = publisher.publish(1, adapter(1), CONFIG, PROBE)
        # One of the two refuses it: nobody keeps it, and the next comes without it.
        servers[1].loading_fails = "the rank is too large"
        with pytest.raises(AdapterInvalid, match="the rank is too large"):
            publisher.publish(2, adapter(2), CONFIG, PROBE)
        assert names(servers[0]) == names(servers[1]) == [good]
        for server in servers:
            assert publisher.current(server.url) == 1
        servers[1].loading_fails = None
        publisher.publish(3, adapter(3), CONFIG, PROBE)
        assert numbers(servers[0]) == numbers(servers[1]) == ["v1", "v3"]


def test_a_name_that_no_server_could_have() -> None:
    for options, said in (
        ({"name": "a b"}, "adapter name 'a b'"),
        ({"transport": "folder"}, "needs a folder"),
        ({"servers": []}, "must be different URLs"),
        ({"address": "127.0.0.1:80"}, "write it as http://HOST:PORT"),
        ({"address": "http://10.1.2.3:80/x", "token": "t"}, "write it as http://HOST:PORT"),
    ):
        with pytest.raises(ValueError, match=said):
            Publisher(**{"servers": ["http://127.0.0.1:1"], "name": "rl"} | options)


def test_an_address_that_others_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN)
    with pytest.raises(ValueError, match="whoever reaches http://trainer:0 could take"):
        Source("http://trainer:0", None)
    monkeypatch.delenv(TRAINER)
    assert own_address(["http://localhost:8000"]) == "http://127.0.0.1"
    assert check_address("http://host:12", "--trainer") == ("host", 12)
    # Said of the name, not of this machine's address.
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with (
        patch.object(socket.socket, "connect", side_effect=unknown),
        pytest.raises(ValueError, match="no host is known by the name node8.*server's URL"),
    ):
        own_address(["http://node8:8000"])
    monkeypatch.setenv(TRAINER, "http://node7:4000")
    assert own_address(["http://localhost:8000"]) == "http://node7:4000"


def proof_of(served: list[float], trained: list[float], dtype: str = "float32") -> Proof:
    return Proof("rl", [-1.0, -2.0], served, trained, dtype, 1e-4)


def test_when_a_server_agrees() -> None:
    # In float32 to the last digits, also where the adapter does nothing yet.
    assert agrees(proof_of([-1.0, -2.0], [-1.0, -2.00005]))
    assert not agrees(proof_of([-1.0, -2.0], [-1.0, -2.001]))
    assert not agrees(proof_of([-1.0, float("nan")], [-1.0, -2.0]))
    # In bfloat16 within rounding, or a quarter of a larger effect.
    assert agrees(proof_of([-1.0, -2.05], [-1.0, -2.0], "bfloat16"))
    assert not agrees(proof_of([-1.0, -2.0], [-1.5, -3.0], "bfloat16"))
    assert agrees(proof_of([-1.4, -2.8], [-1.5, -3.0], "bfloat16"))
    assert not agrees(proof_of([float("nan"), -2.0], [-1.0, -2.0], "bfloat16"))


def test_what_a_server_says_it_took() -> None:
    described = {"label": "v3", "hash": "ab", "count": 4, "bytes": 9, "form": "packed"}
    said = {"label": "v3", "hash": "ab", "count": 4, "bytes": 9, "arrive_s": 1.0, "load_s": 2.0}
    assert acknowledged(json.dumps(said), described, "x").arrive_s == 1.0
    for key, value in (("hash", "ac"), ("count", 3), ("label", "v2"), ("bytes", 8)):
        with pytest.raises(ServerError, match="x: the server took"):
            acknowledged(json.dumps(said | {key: value}), described, "x")
    with pytest.raises(ServerError, match="not what it took"):
        acknowledged("Success: LoRA adapter 'rl' added successfully.", described, "x")
