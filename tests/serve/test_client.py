"""Run the client against a server that behaves as vLLM's handlers do: names, versions, swaps, and
requests that a swap overtakes."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.serve.adapter_names import versioned
from megalora.serve.check import Limits
from megalora.serve.errors import (
    AdapterInvalid,
    AdapterNameTaken,
    AdapterNotFound,
)
from megalora.serve.store import Store
from megalora.serve.vllm import Client
from tests.adapters.folders import edit_config
from tests.serve.adapters import make_adapter
from tests.serve.fake_vllm import BASE, FakeVLLM, answer_of, client, names
from tests.waiting import PATIENCE_S, wait_until

__all__ = ["client"]  # a fixture

# The made-up server's log-probability of a token is minus its number.
PROMPT = [5, 3, 2]


def test_a_version_is_named_after_its_contents(
    client: Client, adapters: list[Path], tiny: Path
) -> None:
    model = client.load("math", adapters[0])
    assert model == versioned("math", adapters[0])
    # A hash of 12 digits.
    assert len(model) == len("math@") + 12
    labelled = client.load("math", adapters[1], version="step-50")
    assert labelled.startswith("math@step-50.")
    # The hash is there too: a label may be used twice, contents may not.
    assert labelled.endswith(versioned("", adapters[1])[1:])
    base, first, second = client.list()
    assert base.is_base
    assert (base.id, base.name, base.version, base.path) == (BASE, BASE, None, str(tiny))
    assert (first.id, first.name, first.version) == (model, "math", model.removeprefix("math@"))
    assert (second.name, second.is_base, second.path) == ("math", False, str(adapters[1].resolve()))


def test_a_name_means_the_version_loaded_last(client: Client, adapters: list[Path]) -> None:
    ids = [client.load("math", adapter) for adapter in adapters]
    assert client.resolve("math") == ids[-1]
    # Whole ids, and the base's name, mean themselves.
    assert client.resolve(ids[0]) == ids[0]
    assert client.resolve(BASE) == BASE
    assert client.complete("math", PROMPT).tokens == answer_of(adapters[2])
    pinned = client.complete(ids[0], PROMPT)
    assert (pinned.model, pinned.version) == (ids[0], ids[0].removeprefix("math@"))
    assert pinned.tokens == answer_of(adapters[0])
    # The base has no versions.
    assert client.complete(BASE, PROMPT).version is None
    with pytest.raises(AdapterNotFound, match=rf"serves no 'maths'; it serves {BASE}, math@"):
        client.resolve("maths")


def test_swapping_leaves_one_version(client: Client, vllm: FakeVLLM, adapters: list[Path]) -> None:
    client.load("other", adapters[0])
    # The last two swaps go back to the first version, and have nothing to do.
    for adapter in (*adapters, adapters[0], adapters[0]):
        model = client.swap("math", adapter)
        assert names(vllm) == [versioned("other", adapters[0]), model]
        assert client.complete("math", PROMPT).tokens == answer_of(adapter)
    # One of other and four of math, though math was swapped five times: the same contents again
    # need no loading.
    actions = [action for action, _ in vllm.calls]
    assert actions.count("load") == 5


def test_going_back_to_a_version_that_is_still_served_makes_it_the_newest(
    client: Client, vllm: FakeVLLM, adapters: list[Path]
) -> None:
    first = client.load("math", adapters[0])
    second = client.load("math", adapters[1])
    assert client.load("math", adapters[1]) == second
    with pytest.raises(
        AdapterNameTaken, match="as an older version of math; swap makes it the newest"
    ):
        client.load("math", adapters[0])
    assert client.swap("math", adapters[0]) == first
    assert names(vllm) == [first]


def test_a_swap_waits_for_this_client_s_requests(
    client: Client, vllm: FakeVLLM, adapters: list[Path]
) -> None:
    old = client.load("math", adapters[0])
    vllm.may_answer.clear()
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(client.complete, "math", PROMPT)
        wait_until(lambda: client._flights[old])
        swapped = pool.submit(client.swap, "math", adapters[1], drain_s=PATIENCE_S)
        # The new one is loaded; the old one has to stay.
        wait_until(lambda: len(names(vllm)) == 2)
        # It would be unloaded by now if nobody waited.
        assert not wait([swapped], timeout=0.2).done
        assert ("unload", old) not in vllm.calls
        vllm.may_answer.set()
        assert asked.result().model == old
        new = swapped.result()
    assert names(vllm) == [new]
    # Nothing is kept of versions that are gone.
    assert not client._flights


def test_a_swap_gives_up_waiting(client: Client, vllm: FakeVLLM, adapters: list[Path]) -> None:
    old = client.load("math", adapters[0])
    vllm.may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.complete, "math", PROMPT)
        wait_until(lambda: client._flights[old])
        client.swap("math", adapters[1], drain_s=0.1)
        # The answer is still out.
        assert client._flights[old]
        vllm.may_answer.set()
        # vLLM ends what it began with the old weights, so going on was safe.
        assert asked.result().tokens == answer_of(adapters[0])


def test_a_request_whose_version_went_is_asked_again(
    client: Client, vllm: FakeVLLM, adapters: list[Path]
) -> None:
    """Another process swaps between this client's resolving and asking."""
    client.load("math", adapters[0])
    ask = client.api.completion
    swapped = []

    def swapped_just_before(model: str, fields: dict) -> dict:
        if not swapped:
            with Client(vllm.url) as other:
                swapped.append(other.swap("math", adapters[1]))
        return ask(model, fields)

    client.api.completion = swapped_just_before  # type: ignore[method-assign]
    answer = client.complete("math", PROMPT)
    assert (answer.model, answer.tokens) == (swapped[0], answer_of(adapters[1]))


def test_a_pinned_version_is_not_replaced_by_another(client: Client, adapters: list[Path]) -> None:
    first = client.load("math", adapters[0])
    client.swap("math", adapters[1])
    with pytest.raises(AdapterNotFound):
        client.complete(first, PROMPT)


def test_many_threads_and_two_clients(client: Client, vllm: FakeVLLM, adapters: list[Path]) -> None:
    expected = {}
    for adapter in adapters:
        expected[versioned("math", adapter)] = answer_of(adapter)
    client.load("math", adapters[0])
    # Long enough for a swap to come between a question and its answer.
    vllm.seconds_per_answer = 0.002
    done = threading.Event()
    swaps: list[str] = []

    def swap() -> None:
        with Client(vllm.url) as other:
            while not done.is_set():
                swaps.append(other.swap("math", adapters[len(swaps) % 3]))

    # One thread swaps and eight ask.
    with ThreadPoolExecutor(9) as pool:
        swapper = pool.submit(swap)
        answers = []
        answered = set()
        # Until every version has answered; a swapper that fails ends its future.
        while not swapper.done() and (len(answers) < 300 or len(answered) < 3):
            answers += pool.map(lambda _: client.complete("math", PROMPT), range(60))
            answered = {answer.model for answer in answers}
        done.set()
        swapper.result()
    # Whichever version answered, it answered with its own weights.
    for answer in answers:
        assert answer.tokens == expected[answer.model]


def test_two_clients_load_the_same_contents_at_once(vllm: FakeVLLM, adapters: list[Path]) -> None:
    clients = [Client(vllm.url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda c: c.swap("math", adapters[0]), clients))
    # The id follows from the contents, so that all four mean one adapter.
    assert len(set(ids)) == 1
    assert names(vllm) == [ids[0]]


@pytest.mark.parametrize("how", ["load", "swap"])
def test_another_client_s_newer_version_stays(
    client: Client, vllm: FakeVLLM, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It comes between this client's loading its own and unloading what is older."""
    client.load("math", adapters[0])
    load = client.api.load_adapter
    newest = versioned("math", adapters[2])

    def load_and_be_overtaken(model: str, path: str) -> None:
        load(model, path)
        with Client(vllm.url) as other:
            getattr(other, how)("math", adapters[2])

    # Ours must not unload what came after it.
    monkeypatch.setattr(client.api, "load_adapter", load_and_be_overtaken)
    mine = client.swap("math", adapters[1])
    # A swap by the other client unloads ours, which is older; a load leaves it.
    if how == "load":
        assert names(vllm) == [mine, newest]
    else:
        assert names(vllm) == [newest]
    assert client.resolve("math") == newest


def test_unloading(client: Client, vllm: FakeVLLM, adapters: list[Path]) -> None:
    first = client.load("math", adapters[0])
    second = client.load("math", adapters[1])
    # One version by its id, then all by their name.
    client.unload(first)
    assert names(vllm) == [second]
    client.load("math", adapters[0])
    client.unload("math")
    assert not names(vllm)
    with pytest.raises(AdapterNotFound, match="unloading math: no such adapter"):
        client.unload("math")
    with pytest.raises(AdapterNotFound):
        client.unload(BASE)


def test_logprobs_of_a_prompt(client: Client, adapters: list[Path]) -> None:
    model = client.load("math", adapters[0])
    # Nothing stands before the first token. An adapter makes each 0.25 less.
    assert client.prompt_logprobs(BASE, PROMPT) == [-3.0, -2.0]
    probe = client.probe("math", PROMPT)
    assert (probe.model, probe.base, probe.adapter) == (model, [-3.0, -2.0], [-3.25, -2.25])
    assert probe.largest_change == 0.25
    assert client.prompt_logprobs(BASE, [7]) == []


def test_logprobs_of_a_prompt_where_lm_head_is_wrapped(
    vllm: FakeVLLM, adapters: list[Path]
) -> None:
    """Prefix by prefix, never with ``prompt_logprobs``, and in more than one request."""
    client = Client(vllm.url, limits=Limits(target_modules=("qkv_proj", "lm_head")))
    model = client.load("math", adapters[0])
    # 181 prefixes. The client asks for 128 at once, since vLLM gives the log-probabilities of up to
    # 128 different tokens for a request.
    tokens = [*range(100), 7, 7, *range(80)]
    asked = []
    ask = client.api.completion

    def listen(model: str, fields: dict) -> dict:
        asked.append(fields)
        answer = ask(model, fields)
        # Choices arrive in any order, so each prompt must say something else: a longer one less.
        for choice in answer["choices"]:
            (top,) = choice["logprobs"]["top_logprobs"]
            length = len(fields["prompt"][choice["index"]])
            for token in top:
                top[token] -= length
        return answer

    client.api.completion = listen  # type: ignore[method-assign]
    probe = client.probe("math", tokens)
    assert probe.model == model
    # Token t after i others: -t of the server, -i of its length here, 0.25 less with the adapter.
    expected = []
    for i, token in enumerate(tokens):
        expected.append(-float(token) - i)
    # Nothing stands before the first.
    expected.pop(0)
    assert probe.base == expected
    assert probe.adapter == [number - 0.25 for number in expected]
    for fields in asked:
        assert "prompt_logprobs" not in fields
        assert len(fields["prompt"]) <= 128
    assert client.prompt_logprobs(BASE, [7]) == []


def test_with_a_store_folders_may_go(vllm: FakeVLLM, tiny: Path, tmp_path: Path) -> None:
    client = Client(vllm.url, store=tmp_path / "store")
    folders = []
    for seed in range(2):
        folder = tmp_path / f"step_{seed}"
        folders.append(make_adapter(folder, tiny, seed, target_modules=["q_proj"]))
    answer = answer_of(folders[0])
    again = shutil.copytree(folders[0], tmp_path / "again")
    first = client.swap("math", folders[0], version="step-0")
    # As checkpoint.keep does; vLLM may read the folder again.
    shutil.rmtree(folders[0])
    copy = tmp_path / "store" / first
    assert vllm.adapters[first] == (str(copy), answer)
    assert {path.name for path in copy.iterdir()} == {CONFIG, WEIGHTS}

    client.swap("math", folders[1])
    # Requests that began with it may need it still.
    assert copy.is_dir()
    # Much later: the first was unloaded long ago, and the second has been served all the time.
    for place in (copy, tmp_path / "store" / names(vllm)[0]):
        os.utime(place, (0, 0))
    client.load("other", again)
    assert len(names(vllm)) == 2
    # What is served is never removed, however old.
    assert {path.name for path in (tmp_path / "store").iterdir()} == set(names(vllm))


def test_a_store_copies_only_what_the_name_says(tiny: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny, 0, target_modules=["q_proj"])
    store = Store(tmp_path / "store")
    model = versioned("math", folder)
    # As a training that writes over its last checkpoint.
    edit_config(folder, lora_alpha=3)
    with pytest.raises(AdapterInvalid, match="changed while it was being copied"):
        store.keep(model, folder)
    assert not list(store.folder.iterdir())
