"""Adapters change every second while six threads ask: of 200 requests and more none is lost, none
answered by a version out of service.

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

from megalora.serve.server import Server
from megalora.serve.vllm import Client, Completion, versioned
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
    folders = [make_adapter(tmp_path / f"step_{i}", tiny, 100 + i) for i in range(VERSIONS)]
    expected = {}
    for folder in folders:
        model = stock_model(tiny, folder)
        expected[versioned("math", folder)] = [greedy(model, prompt, TOKENS) for prompt in PROMPTS]
    for answers_to_prompt in zip(*expected.values(), strict=True):
        different = {tuple(tokens) for tokens in answers_to_prompt}
        assert len(different) == VERSIONS, "each version says something else"
    client.load("math", folders[-1])
    client.complete("math", PROMPTS[0])  # vLLM's first answer takes seconds
    answers, swaps = ask_while_swapping(server, client, folders)

    assert len(answers) >= REQUESTS and len(swaps) >= LEAST_SWAPS
    for answer, number, asked, answered in answers:
        assert answer.tokens == expected[answer.model][number % len(PROMPTS)], (
            "the version that answered says this"
        )
        assert answer.model in in_service(swaps, asked, answered, versioned("math", folders[-1]))
    assert {answer.model for answer, *_ in answers} == expected.keys()
    assert [s.id for s in client.list() if not s.is_base] == [swaps[-1]["model"]], (
        "old versions are gone"
    )


type Answer = tuple[Completion, int, float, float]
"""With the prompt's number, and the times it was asked and answered."""


def ask_while_swapping(
    server: Server, client: Client, folders: list[Path]
) -> tuple[list[Answer], list[dict]]:
    """All answers, a lost one raises; and all swaps."""
    command = [
        sys.executable,
        "-m",
        "tests.serve.swapper",
        server.url,
        str(server.store),
        *map(str, folders),
    ]
    swapper = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert swapper.stdin and swapper.stdout
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
            list(pool.map(ask, range(THREADS)))
        swapper.stdin.close()  # which tells it to stop
        swapper.wait(PATIENCE_S)
        reader.join()
    finally:
        swapper.kill()
        swapper.wait()
    assert swapper.returncode == 0
    assert sorted(number for _, number, _, _ in answers)[:REQUESTS] == list(range(REQUESTS)), (
        "none is lost"
    )
    return answers, swaps


def in_service(swaps: list[dict], start: float, end: float, before: str) -> set[str]:
    """The versions that NAME may have meant at some time from ``start`` to ``end``: each from when
    its swap began until the next was done."""
    found = set()
    model = before
    began = 0.0
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
    with (
        Client(server.url) as other,
        pytest.raises(ValueError, match="rank 65 is greater than max_lora_rank 64"),
    ):
        other.swap("math", bad)  # knows no limits, so that the server refuses
    assert client.complete("math", PROMPTS[0], max_tokens=1).model == model
