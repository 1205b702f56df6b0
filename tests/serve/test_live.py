"""Publish adapters from a training's memory into vLLM: what arrives is what a loaded folder is, bit
for bit, and nothing is lost or mistaken while it happens."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch import Tensor

from megalora.adapters.write.form import adapter_contents, write_adapter
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.serve.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterRankTooLarge,
    ServerError,
    ServerUnreachable,
)
from megalora.serve.live.publisher import Publisher
from megalora.serve.server import Server, free_port
from megalora.serve.vllm import Client
from tests.parity.built import random_factors
from tests.serve.adapters import EVERYTHING, tokens_of
from tests.serve.conftest import TOKEN, VLLM_ENVIRONMENT
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.vllm
PROMPT = tokens_of(0, 40)


@dataclass
class Trained:
    """An adapter as a training holds it."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    folder: Path
    factors: dict[str, Tensor]
    """By the names of training."""


def trained(folder: Path, base: Path, seed: int, **lora: Any) -> Trained:
    config = LoRAConfig(**({"rank": 4, "alpha": 6.0, "target_modules": EVERYTHING} | lora))
    adapted, factors = random_factors(config, base, seed)
    shape = model_shape(read_hf_config(base))
    folder.mkdir(parents=True)
    write_adapter(folder, adapted, shape, factors, str(base))
    tensors, peft, _ = adapter_contents(adapted, shape, factors, str(base))
    return Trained(tensors, peft, folder, factors)


def publisher_of(server: Server, **options: Any) -> Publisher:
    return Publisher([server.url], "rl", token=TOKEN, **options)


def answer(client: Client, model: str, tokens: int = 24) -> tuple[list[int], list[float]]:
    found = client.complete(model, PROMPT, max_tokens=tokens, ignore_eos=True)
    return found.tokens, found.logprobs


@pytest.fixture(scope="module")
def versions(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    """Adapters that say different things."""
    folder = tmp_path_factory.mktemp("versions")
    return [trained(folder / str(seed), tiny, 60 + seed) for seed in range(4)]


def test_a_request_under_way_keeps_its_version(
    server: Server, client: Client, versions: list[Trained]
) -> None:
    count = 200
    with publisher_of(server, keep=1) as publisher:
        old = publisher.publish(0, versions[0].tensors, versions[0].config)
        undisturbed = answer(client, old, count)
        body = {
            "model": "rl", "prompt": PROMPT, "max_tokens": count, "ignore_eos": True,
            "temperature": 0.0, "logprobs": 0, "return_token_ids": True, "stream": True,
        }  # fmt: skip
        tokens: list[int] = []
        logprobs: list[float] = []
        new = ""
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S, trust_env=False
        ) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                (choice,) = json.loads(data)["choices"]
                tokens += choice["token_ids"]
                logprobs += choice["logprobs"]["token_logprobs"]
                # In the middle: the next version comes, and this one is unloaded and dropped.
                if not new and len(tokens) >= count // 4:
                    new = publisher.publish(1, versions[1].tensors, versions[1].config)
                    assert len(tokens) < count
        assert (tokens, logprobs) == undisturbed
        assert [served.id for served in client.list() if not served.is_base] == [new]
        assert answer(client, "rl", 8)[0] == answer(client, new, 8)[0] != undisturbed[0][:8]


SYNCS = 100
THREADS = 2


def test_a_hundred_syncs_under_load(
    server: Server, client: Client, versions: list[Trained]
) -> None:
    """Requests ask for the newest id as they begin; of four contents that come again and again,
    each answers what it always answers."""
    tokens = 2
    with publisher_of(server, keep=2) as publisher:
        expected = []
        for number, version in enumerate(versions):
            ident = publisher.publish(number, version.tensors, version.config)
            expected.append(client.complete(ident, PROMPT, max_tokens=tokens).tokens)
        assert len(set(map(tuple, expected))) == len(versions)
        done = threading.Event()
        answered: list[int] = []

        def ask(_: int) -> None:
            with server.client() as asking:
                while not done.is_set():
                    # The version that is newest, or the one before by the time it is accepted.
                    number = publisher.current(server.url)
                    assert number is not None
                    try:
                        ident = publisher.id_of(number)
                        found = asking.complete(ident, PROMPT, max_tokens=tokens)
                    except (KeyError, AdapterNotFound):
                        # Two versions have come since.
                        continue
                    assert found.model == ident
                    assert found.tokens == expected[number % len(versions)]
                    answered.append(number)

        with ThreadPoolExecutor(THREADS) as pool:
            asking = [pool.submit(ask, thread) for thread in range(THREADS)]
            try:
                for number in range(len(versions), len(versions) + SYNCS):
                    version = versions[number % len(versions)]
                    ident = publisher.publish(number, version.tensors, version.config)
                    assert client.names() == {"rl": ident}
            finally:
                done.set()
            for asked in asking:
                asked.result()
        assert len(answered) > SYNCS
        # All the way, not in the beginning alone.
        assert max(answered) >= len(versions) + SYNCS - 2
        assert len(client.list()) == 3


def test_what_the_base_cannot_hold_is_refused(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    large = trained(tmp_path / "large", tiny, 1, rank=65)
    with publisher_of(server) as publisher:
        with pytest.raises(AdapterRankTooLarge, match="rank 65 is greater than max_lora_rank 64"):
            publisher.publish(0, large.tensors, large.config)
        # Of three experts only, in the form that vLLM would copy into a corner.
        few = trained(tmp_path / "few", tiny, 2)
        for name in list(few.tensors):
            number = name.partition(".experts.")[2].partition(".")[0]
            if number and int(number) > 2:
                del few.tensors[name]
        with pytest.raises(AdapterInvalid, match="3 experts were sent, and the base has"):
            publisher.publish(0, few.tensors, few.config)
        # The server is well.
        good = trained(tmp_path / "good", tiny, 3)
        ident = publisher.publish(1, good.tensors, good.config)
        assert [served.id for served in client.list() if not served.is_base] == [ident]


def test_what_a_server_proves(server: Server, client: Client, versions: list[Trained]) -> None:
    made = versions[0]
    with publisher_of(server) as publisher:
        ident = publisher.publish(0, made.tensors, made.config)
        probe = {"tokens": PROMPT, "logprobs": client.prompt_logprobs(ident, PROMPT)}
        client.unload("rl")
        publisher.publish(0, made.tensors, made.config, probe | {"dtype": "float32"})
        # The training has other log-probabilities than what it publishes: of the version before.
        other = versions[1]
        with pytest.raises(ServerError, match="NOT what was trained"):
            publisher.publish(1, other.tensors, other.config, probe | {"dtype": "float32"})
        assert publisher.current(server.url) == 0


# tests/serve/test_rl.py kills one in the middle of a training.
@pytest.mark.long
def test_a_server_that_is_killed_and_started_again(
    tiny: Path, tmp_path: Path, versions: list[Trained]
) -> None:
    made = versions[2]
    port = free_port("127.0.0.1")
    options = {"max_rank": 8, "max_loras": 2, "env": VLLM_ENVIRONMENT, "port": port}
    first = Server(tiny, trainer="http://127.0.0.1", log=tmp_path / "1.log", **options).start()
    with publisher_of(first) as publisher:
        with first.client() as client:
            ident = publisher.publish(0, made.tensors, made.config)
            expected = answer(client, ident)
            probe = {"tokens": PROMPT, "logprobs": client.prompt_logprobs(ident, PROMPT)}
        assert first._process is not None
        os.killpg(first._process.pid, signal.SIGKILL)
        first.stop()
        with pytest.raises(ServerUnreachable):
            publisher.publish(1, versions[3].tensors, versions[3].config)
        with (
            Server(tiny, trainer="http://127.0.0.1", log=tmp_path / "2.log", **options) as second,
            second.client() as client,
        ):
            # What the training waited with: both versions are there, in order, and prove.
            new = publisher.publish(1, versions[3].tensors, versions[3].config)
            assert [served.id for served in client.list()[1:]] == [ident, new]
            assert answer(client, ident) == expected
            publisher.publish(2, made.tensors, made.config, probe | {"dtype": "float32"})
            assert publisher.current(second.url) == 2
