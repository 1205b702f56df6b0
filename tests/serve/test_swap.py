"""Change adapters every second while six threads ask: of 200 requests and more none is lost, and
none is answered by a version that is out of service.

What each version must say comes from stock PEFT, not from the server. The swaps come from another
process.
"""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megalora.serve.adapter_names import versioned
from megalora.serve.server import Server
from megalora.serve.vllm import Client, Completion
from tests.peft_warnings import IGNORED
from tests.serve.adapters import make_adapter, tokens_of
from tests.serve.stock_peft import greedy, stock_model
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.vllm, IGNORED]
ROOT = Path(__file__).parents[2]
REQUESTS = 200
THREADS = 6
VERSIONS = 3
TOKENS = 8
LEAST_SWAPS = 2 * VERSIONS
"""So that every version comes twice, however fast or slow the machine."""
PROMPTS = [tokens_of(seed, 4 + seed) for seed in range(4)]


def test_no_request_is_lost_or_answered_by_the_wrong_version(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    folders = []
    # Id -> the version's answers to all prompts.
    expected: dict[str, list[list[int]]] = {}
    for i in range(VERSIONS):
        folder = make_adapter(tmp_path / f"step_{i}", tiny, 100 + i)
        folders.append(folder)
        model = stock_model(tiny, folder)
        answers_of_model = [greedy(model, prompt, TOKENS) for prompt in PROMPTS]
        expected[versioned("math", folder)] = answers_of_model
    # Every version says something else, or an answer would not tell who gave it.
    for answers_to_prompt in zip(*expected.values(), strict=True):
        assert len(set(map(tuple, answers_to_prompt))) == VERSIONS
    client.load("math", folders[-1])
    # vLLM's first answer takes seconds.
    client.complete("math", PROMPTS[0])
    answers, swaps = ask_while_swapping(server, client, folders)

    assert len(answers) >= REQUESTS
    assert len(swaps) >= LEAST_SWAPS
    answered_by = set()
    for answer, number, asked, answered in answers:
        # The version that answered says this, and NAME meant it while the answer was out.
        assert answer.tokens == expected[answer.model][number % len(PROMPTS)]
        assert answer.model in in_service(swaps, asked, answered, versioned("math", folders[-1]))
        answered_by.add(answer.model)
    assert answered_by == expected.keys()
    # Old versions are gone.
    base, last = client.list()
    assert base.is_base
    assert last.id == swaps[-1]["model"]


type Answer = tuple[Completion, int, float, float]
"""An answer, the question's number, and the times at which it was asked and answered."""


def ask_while_swapping(
    server: Server, client: Client, folders: list[Path]
) -> tuple[list[Answer], list[dict]]:
    """All answers, of which a lost one raises, and all swaps."""
    command = [
        sys.executable,
        "-m",
        "tests.serve.swapper",
        server.url,
        str(server.store),
        *map(str, folders),
    ]
    # A process, so that it does not share this one's interpreter lock or its client.
    swapper = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert swapper.stdin and swapper.stdout
    # Taking the next number is atomic, so that no two threads have the same.
    numbers = itertools.count()
    answers: list[Answer] = []
    swaps: list[dict] = []

    def read_swaps(lines: Iterable[str]) -> None:
        for line in lines:
            swaps.append(json.loads(line))

    def ask(_: int) -> None:
        while (number := next(numbers)) < REQUESTS or len(swaps) < LEAST_SWAPS:
            assert reader.is_alive(), "the swapper has ended"
            asked = time.time()
            answer = client.complete(
                "math", PROMPTS[number % len(PROMPTS)], max_tokens=TOKENS, ignore_eos=True
            )
            answers.append((answer, number, asked, time.time()))

    try:
        reader = threading.Thread(target=read_swaps, args=[swapper.stdout])
        reader.start()
        # Requests begin with a version in service that a swap has loaded.
        wait_until(lambda: swaps or not reader.is_alive())
        with ThreadPoolExecutor(THREADS) as pool:
            # Reading the results raises what a thread raised.
            list(pool.map(ask, range(THREADS)))
        # Which tells it to stop.
        swapper.stdin.close()
        swapper.wait(PATIENCE_S)
        reader.join()
    finally:
        swapper.kill()
        swapper.wait()
    assert swapper.returncode == 0
    # None is lost: every question from the first on has its answer.
    answered = sorted(number for _, number, _, _ in answers)
    assert answered[:REQUESTS] == list(range(REQUESTS))
    return answers, swaps


def in_service(swaps: list[dict], start: float, end: float, before: str) -> set[str]:
    """The versions that NAME may have meant at some time from ``start`` to ``end``: each from when
    its swap began until the next was done."""
    found = set()
    model = before
    began = 0.0
    # The last version is in service for ever: a swap after it that is never done.
    for swap in [*swaps, {"model": "", "began": 0.0, "done": float("inf")}]:
        # ``model`` was in service from ``began`` until this swap was done.
        if began <= end and swap["done"] >= start:
            found.add(model)
        model = swap["model"]
        began = swap["began"]
    return found


def test_an_adapter_that_cannot_be_loaded_leaves_the_old_one_in_service(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    good = make_adapter(tmp_path / "good", tiny, 1)
    bad = make_adapter(tmp_path / "bad", tiny, 2, rank=65)
    model = client.swap("math", good)
    # A client that knows no limits, so that the server refuses.
    with (
        Client(server.url) as other,
        pytest.raises(ValueError, match="rank 65 is greater than max_lora_rank 64"),
    ):
        other.swap("math", bad)
    assert client.complete("math", PROMPTS[0], max_tokens=1).model == model
