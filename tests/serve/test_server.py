"""vLLM itself: does it compute our adapters, what does it refuse, what does it do with requests
whose adapter changes."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.serve.errors import (
    AdapterInvalid,
    AdapterNameTaken,
    AdapterNotFound,
    AdapterRankTooLarge,
    AdapterTargetsUnserved,
    RequestRefused,
    ServerError,
)
from megalora.serve.server import Server
from megalora.serve.vllm import Client, versioned
from tests.adapters.folders import edit_config, edit_tensors
from tests.named_tensors import Change, Tensors, only_parts, renamed
from tests.peft_warnings import IGNORED
from tests.serve.adapters import (
    ATTENTION,
    EXPERTS,
    make_adapter,
    tokens_of,
)
from tests.serve.stock_peft import greedy, logprobs, stock_model

pytestmark = [pytest.mark.vllm, IGNORED]
ATOL = 5e-5
"""Of a log-probability: float32 through 4 layers errs by some 2^-24 * 100 of the largest logit, 5,
and vLLM sums in other orders."""
LONG = 300
"""Tokens. vLLM's CPU build caches prefixes in blocks of 128."""


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
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


def assert_close(found: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=ATOL)


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
        assert probe.model == versioned(name, folder) and probe.largest_change > 0.05, name


def test_what_is_generated(client: Client, tiny: Path, adapters: dict[str, Path]) -> None:
    model = client.load("all", adapters["all"])
    prompt = tokens_of(3, 11)
    answer = client.complete("all", prompt, max_tokens=12, ignore_eos=True)
    assert (answer.model, answer.version, answer.finish_reason) == (
        model,
        model.removeprefix("all@"),
        "length",
    )
    stock = stock_model(tiny, adapters["all"])
    assert answer.tokens == greedy(stock, prompt, 12)
    assert_close(answer.logprobs, logprobs(stock, [*prompt, *answer.tokens])[len(prompt) - 1 :])
    with pytest.raises(RequestRefused, match="maximum context length is 4096"):
        client.complete("all", [1] * 5000)


def rename(old: str, new: str) -> Change:
    return renamed(lambda name: name.replace(old, new))


def change_q_proj_a(change: Callable[[Tensor], Tensor]) -> Change:
    """Change A of q_proj in every layer."""

    def changed(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if "q_proj.lora_A" in name:
                tensors[name] = change(tensor)
        return tensors

    return changed


def all_nan(tensors: Tensors) -> Tensors:
    return {name: tensor * float("nan") for name, tensor in tensors.items()}


REFUSED: dict[str, tuple[dict, Callable[[Path], object], type[Exception], str]] = {
    "rank": (
        {"rank": 65},
        lambda f: None,
        AdapterRankTooLarge,
        "rank 65 is greater than max_lora_rank 64; start the server",
    ),
    "lm_head": (
        {"target_modules": ["lm_head", "q_proj"]},
        lambda f: None,
        AdapterTargetsUnserved,
        "adapter's lm_head",
    ),
    "a deeper base": (
        {},
        lambda f: edit_tensors(f, rename("layers.3", "layers.4")),
        AdapterTargetsUnserved,
        "layers.4",
    ),
    "no config": ({}, lambda f: (f / CONFIG).unlink(), AdapterNotFound, "No adapter found for"),
    "no weights": ({}, lambda f: (f / WEIGHTS).unlink(), AdapterInvalid, "doesn't contain tensors"),
    "cut short": (
        {},
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        AdapterInvalid,
        "deserializing",
    ),
    "DoRA": (
        {},
        lambda f: edit_config(f, use_dora=True),
        AdapterInvalid,
        "does not yet support DoRA",
    ),
    "no B": ({}, lambda f: edit_tensors(f, only_parts("lora_A")), AdapterInvalid, "NoneType"),
    "no up_proj": (
        {},
        lambda f: edit_tensors(f, only_parts("gate_proj", "down_proj")),
        AdapterInvalid,
        "no reason given",
    ),
    "no tensors": ({}, lambda f: edit_tensors(f, lambda _: {}), AdapterInvalid, "no reason given"),
    "too wide": (
        {},
        lambda f: edit_tensors(f, change_q_proj_a(lambda a: torch.cat([a, a], 1))),
        AdapterInvalid,
        "must match the size",
    ),
    "unknown module": (
        {},
        lambda f: edit_tensors(f, rename("o_proj", "oh_proj")),
        AdapterInvalid,
        "expected target modules",
    ),
}


def test_what_vllm_refuses_has_a_type(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    """Past our own check, and the server lives on. Our plug-in is behind the two whose modules
    nothing would use."""
    expected = logprobs(stock_model(tiny), tokens_of(0, 9))
    for case, (lora, spoil, error, message) in REFUSED.items():
        folder = make_adapter(tmp_path / case, tiny, 0, **lora)
        spoil(folder)
        with pytest.raises(error, match=message) as caught:
            client._api.load_adapter("bad", str(folder))
        assert type(caught.value) is error, case
        with pytest.raises((AdapterInvalid, AdapterNotFound)):
            client.load("bad", folder)
    with pytest.raises(AdapterNotFound, match="No adapter found for /nowhere; the server must see"):
        client._api.load_adapter("bad", "/nowhere")
    with pytest.raises(AdapterNameTaken, match="conflicts with a served base model"):
        client._api.load_adapter(str(tiny), str(tmp_path))
    with pytest.raises(AdapterNotFound, match="cannot be found"):
        client._api.unload_adapter("bad")
    assert [s.id for s in client.list()] == [str(tiny)] and client.health()
    assert_close(client.prompt_logprobs(str(server.base), tokens_of(0, 9)), expected)


TAKEN: dict[str, Callable[[Path], object]] = {
    "NaN": lambda f: edit_tensors(f, all_nan),
    "a narrower base": lambda f: edit_tensors(f, change_q_proj_a(lambda a: a[:, :64])),
    "another rank than the config's": lambda f: edit_config(f, r=8),
}


def test_what_vllm_takes_without_a_word(client: Client, tiny: Path, tmp_path: Path) -> None:
    """Why we look first. Where this fails, vLLM has become stricter."""
    for case, spoil in TAKEN.items():
        folder = make_adapter(tmp_path / case, tiny, 0, target_modules=ATTENTION)
        spoil(folder)
        client._api.load_adapter(case, str(folder))
        with pytest.raises(AdapterInvalid):
            client.load("careful", folder)


def test_a_request_outlives_its_adapter(client: Client, adapters: dict[str, Path]) -> None:
    prompt = tokens_of(5, 6)
    first = client.swap("math", adapters["all"])
    undisturbed = client.complete("math", prompt, max_tokens=200, ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.complete, first, prompt, max_tokens=200, ignore_eos=True)
        time.sleep(0.3)
        second = client.swap("math", adapters["attention"], drain_s=0)
        assert not asked.done() and client.complete("math", prompt, max_tokens=1).model == second
        assert (asked.result().model, asked.result().tokens) == (first, undisturbed.tokens)
    with pytest.raises(AdapterNotFound):
        client.complete(first, prompt)


def test_new_contents_in_an_old_folder(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    """The prefix cache goes by name and path. Under the same two, vLLM mixes old keys and values
    with new weights."""
    folder = tmp_path / "latest"
    prompt = tokens_of(8, LONG)
    old, new = (make_adapter(tmp_path / str(seed), tiny, seed) for seed in (1, 2))
    expected = logprobs(stock_model(tiny, new), [*prompt, 0])  # of which the last is not compared

    def first_logprob(model: str) -> tuple[int, float]:
        answer = client.complete(model, prompt, max_tokens=1)
        return answer.tokens[0], answer.logprobs[0]

    shutil.copytree(old, folder)
    client._api.load_adapter("plain", str(folder))
    with Client(server.url) as careful:  # no store, so that the path stays the same, too
        careful.swap("careful", folder)
        before = first_logprob("careful")
        assert first_logprob("plain") == pytest.approx(before, abs=ATOL)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(new / name, folder / name)
        client._api.unload_adapter("plain")
        client._api.load_adapter("plain", str(folder))
        careful.swap("careful", folder)
    token, number = first_logprob("careful")
    right = logprobs(stock_model(tiny, new), [*prompt, token])[-1]
    assert number == pytest.approx(right, abs=ATOL) and len(expected) == LONG
    assert abs(first_logprob("plain")[1] - right) > 100 * ATOL, "vLLM notices by itself now"


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
    assert server.max_cpu_loras is not None
    for i in range(server.max_cpu_loras + 1):
        client._api.load_adapter(f"filler-{i}", str(filler))
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
        ids = {name: versioned(name, folder) for name, folder in folders.items()}
        assert [s.id for s in client.list()] == [str(tiny), *ids.values()]
        assert second.limits.max_rank == 8 and set(second.limits.target_modules or ()) == {
            "lm_head",
            "qkv_proj",
        }
        text = tokens_of(4, 150)
        with ThreadPoolExecutor(4) as pool:
            probes = list(pool.map(lambda name: client.probe(name, text), [*ids, *ids]))
        for name, folder in folders.items():
            expected = logprobs(stock_model(tiny, folder), text)
            for probe in probes:
                if probe.model == ids[name]:
                    assert_close(probe.adapter, expected)
                    assert_close(probe.base, logprobs(stock_model(tiny), text))
        log = (tmp_path / "vllm.log").read_text()
    assert not second.client().health() and "Loaded new LoRA adapter" in log


def test_a_server_that_cannot_start_says_why(tiny: Path, tmp_path: Path) -> None:
    """The cause is in the log of another process than the one that ends."""
    odd = shutil.copytree(tiny, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text()) | {"head_dim": 48}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServerError, match=r"(?s)exit code 1 .*vllm.log\):\n  .*48"):
        Server(odd, log=tmp_path / "vllm.log").start()
