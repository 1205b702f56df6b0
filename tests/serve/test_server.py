"""Run vLLM itself: it computes our adapters, and ends requests whose adapter changes as it began
them."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.serve.adapter_names import versioned
from megalora.serve.answers import Completion
from megalora.serve.errors import (
    AdapterNotFound,
    RequestRefused,
    ServerError,
)
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from tests.peft_warnings import IGNORED
from tests.serve.adapters import (
    ATTENTION,
    EXPERTS,
    make_adapter,
    tokens_of,
)
from tests.serve.stock_peft import ATOL, assert_close, greedy, logprobs, stock_model

pytestmark = [pytest.mark.vllm, IGNORED]
LONG = 300
"""Tokens of a prompt that is cached: vLLM's CPU build caches prefixes in blocks of 128."""


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> an adapter of it. Four, as many as the server takes in a batch."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {
        "attention": ATTENTION,
        "experts": EXPERTS,
        "router": ["gate"],
        "all": [*ATTENTION, *EXPERTS, "gate"],
    }
    made = {}
    for seed, (name, targets) in enumerate(kinds.items()):
        # Every one has a rank of its own.
        made[name] = make_adapter(folder / name, tiny, seed, target_modules=targets, rank=3 + seed)
    return made


def test_base_and_adapters_in_the_same_batches(
    client: Client, tiny: Path, adapters: dict[str, Path]
) -> None:
    """The plug-in's experts and router, vLLM's attention, and base requests beside them: all slots
    taken, many lengths, at once."""
    for name, folder in adapters.items():
        client.load(name, folder)
    jobs = []
    # Five texts for each, in turns, so that neighbours in a batch belong to different adapters.
    for j in range(5):
        for i, name in enumerate([*adapters, str(tiny)]):
            jobs.append((name, tokens_of(seed=10 * i + j, length=5 + 7 * j + i)))
    # A thread for each, so that all of them wait in vLLM's queue at once.
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: client.prompt_logprobs(*job), jobs))
    for name, folder in [*adapters.items(), (str(tiny), None)]:
        model = stock_model(tiny, folder)
        for job, numbers in zip(jobs, found, strict=True):
            if job[0] == name:
                assert_close(numbers, logprobs(model, job[1]))


def test_every_adapter_does_something(client: Client, adapters: dict[str, Path]) -> None:
    for name, folder in adapters.items():
        client.load(name, folder)
        probe = client.probe(name, tokens_of(1, 20))
        assert probe.model == versioned(name, folder)
        # A thousand times ATOL. Stock vLLM 0.32 loads the router's and ignores it; the plug-in does
        # not.
        assert probe.largest_change > 0.05, name


def test_what_is_generated(client: Client, tiny: Path, adapters: dict[str, Path]) -> None:
    model = client.load("all", adapters["all"])
    prompt = tokens_of(3, 11)
    answer = client.complete("all", prompt, max_tokens=12, ignore_eos=True)
    assert (answer.model, answer.version) == (model, model.removeprefix("all@"))
    assert answer.finish_reason == "length"
    stock = stock_model(tiny, adapters["all"])
    assert answer.tokens == greedy(stock, prompt, 12)
    # Of all tokens but the first; the generated ones begin behind the prompt's len(prompt) - 1.
    expected = logprobs(stock, [*prompt, *answer.tokens])[len(prompt) - 1 :]
    assert_close(answer.logprobs, expected)
    # The tiny model's positions end there.
    with pytest.raises(RequestRefused, match="maximum context length is 4096"):
        client.complete("all", [1] * 5000)


@dataclass
class Outlived:
    """A request to ``asked`` during which NAME was swapped to ``swapped``."""

    asked: str
    swapped: str
    answer: Completion
    under_way: bool
    """Whether the request was still being answered when the swap had been made."""


def swap_during_a_request(
    client: Client, adapters: dict[str, Path], prompt: list[int], tokens: int
) -> Outlived:
    first = client.swap("math", adapters["all"])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.complete, first, prompt, max_tokens=tokens, ignore_eos=True)
        # Time to begin; an answer of 200 tokens takes a second or more.
        time.sleep(0.3)
        second = client.swap("math", adapters["attention"], drain_s=0)
        under_way = not asked.done()
        return Outlived(first, second, asked.result(), under_way)


def test_a_request_outlives_its_adapter(client: Client, adapters: dict[str, Path]) -> None:
    prompt = tokens_of(5, 6)
    # A busy machine has been seen to take longer for a swap than for 200 tokens.
    for tokens in (200, 800, 3200):
        found = swap_during_a_request(client, adapters, prompt, tokens)
        if found.under_way:
            break
    assert found.under_way
    assert client.complete("math", prompt, max_tokens=1).model == found.swapped
    with pytest.raises(AdapterNotFound):
        client.complete(found.asked, prompt)
    # It ended with the weights that it began with.
    assert found.answer.model == found.asked
    client.swap("math", adapters["all"])
    undisturbed = client.complete("math", prompt, max_tokens=tokens, ignore_eos=True)
    assert found.answer.tokens == undisturbed.tokens


def test_new_contents_in_an_old_folder(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    """The prefix cache goes by name and path. Under the same two, vLLM mixes old keys and values
    with new weights."""
    folder = tmp_path / "latest"
    prompt = tokens_of(8, LONG)
    old = make_adapter(tmp_path / "1", tiny, 1)
    new = make_adapter(tmp_path / "2", tiny, 2)

    def first_logprob(model: str) -> tuple[int, float]:
        answer = client.complete(model, prompt, max_tokens=1)
        return answer.tokens[0], answer.logprobs[0]

    shutil.copytree(old, folder)
    client.api.load_adapter("plain", str(folder))
    # A client without a store, so that the path stays the same here too.
    with Client(server.url) as careful:
        careful.swap("careful", folder)
        before = first_logprob("careful")
        assert first_logprob("plain") == pytest.approx(before, abs=ATOL)
        # As training does that writes every checkpoint to the same place.
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(new / name, folder / name)
        client.api.unload_adapter("plain")
        client.api.load_adapter("plain", str(folder))
        careful.swap("careful", folder)
    token, number = first_logprob("careful")
    right = logprobs(stock_model(tiny, new), [*prompt, token])[-1]
    assert number == pytest.approx(right, abs=ATOL)
    # Where this fails, vLLM has learnt to notice by itself.
    assert abs(first_logprob("plain")[1] - right) > 100 * ATOL


def test_an_adapter_outlives_its_folder(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    """vLLM drops it from memory and reads it again. Without our copy the request would kill the
    engine."""
    folder = make_adapter(tmp_path / "step_1", tiny, 1, target_modules=ATTENTION)
    prompt = tokens_of(9, 20)
    client.swap("math", folder)
    expected = client.prompt_logprobs("math", prompt)
    filler = make_adapter(tmp_path / "filler", tiny, 2, target_modules=["q_proj"], rank=1)
    shutil.rmtree(folder)
    # One more than fit in the server's memory: the one used longest ago is dropped.
    assert server.max_cpu_loras is not None
    for i in range(server.max_cpu_loras + 1):
        client.api.load_adapter(f"filler-{i}", str(filler))
    assert client.prompt_logprobs("math", prompt) == pytest.approx(expected, abs=ATOL)


def test_lm_head_and_adapters_from_the_start(tiny: Path, tmp_path: Path, server: Server) -> None:
    """A server of its own. With lm_head wrapped, two requests with ``prompt_logprobs`` at once kill
    vLLM's CPU build."""
    folders = {
        "head": make_adapter(
            tmp_path / "head", tiny, 0, target_modules=["lm_head", "v_proj"], rank=5
        ),
        "other": make_adapter(tmp_path / "other", tiny, 1, target_modules=["q_proj"], rank=2),
    }
    start = time.monotonic()
    with (
        Server(tiny, folders, log=tmp_path / "vllm.log", env=server.env) as second,
        second.client() as client,
    ):
        print(f"ready after {time.monotonic() - start:.0f} s")
        ids = {}
        for name, folder in folders.items():
            ids[name] = versioned(name, folder)
        assert [served.id for served in client.list()] == [str(tiny), *ids.values()]
        # Ranks 5 and 2 need 8, the next that vLLM knows.
        assert second.limits.max_rank == 8
        assert set(second.limits.target_modules or ()) == {"lm_head", "qkv_proj"}
        # Longer than the 128 log-probabilities that vLLM gives for one request.
        text = tokens_of(4, 150)
        with ThreadPoolExecutor(4) as pool:
            # Each of the two twice, so that both are asked at once.
            probes = list(pool.map(lambda name: client.probe(name, text), [*ids, *ids]))
        for name, folder in folders.items():
            expected = logprobs(stock_model(tiny, folder), text)
            for probe in probes:
                if probe.model == ids[name]:
                    assert_close(probe.adapter, expected)
                    assert_close(probe.base, logprobs(stock_model(tiny), text))
        log = (tmp_path / "vllm.log").read_text()
    assert not second.client().health()
    assert "Loaded new LoRA adapter" in log


def test_a_server_that_cannot_start_says_why(tiny: Path, tmp_path: Path) -> None:
    """The cause is in the log of another process than the one that ends."""
    # vLLM's CPU attention has kernels for some sizes of a head, and 48 is none of them.
    odd = shutil.copytree(tiny, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text()) | {"head_dim": 48}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServerError, match=r"(?s)exit code 1 .*vllm.log\):\n  .*48"):
        Server(odd, log=tmp_path / "vllm.log").start()
