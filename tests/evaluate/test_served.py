"""Answers of a server that behaves as vLLM's handlers do: what it is asked, how its answers are
judged, and what is refused."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megalora.evaluate import served
from megalora.evaluate.request import Request
from megalora.serve.vllm import Client
from tests.jsonl import read_jsonl
from tests.refused_commands import Said, refused
from tests.serve.adapters import make_adapter
from tests.serve.fake_vllm import BASE, LONGEST, FakeVLLM, answer_of, fake_vllm
from tests.waiting import wait_until

__all__ = ["refused"]  # a fixture


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters, each with an answer of its own."""
    folder = tmp_path_factory.mktemp("served")
    return [
        make_adapter(folder / f"of-{seed}", tiny, seed, target_modules=["q_proj"])
        for seed in range(2)
    ]


@pytest.fixture
def vllm(tiny: Path, adapters: list[Path]) -> Iterator[FakeVLLM]:
    """Serves the first adapter as ``math``."""
    with fake_vllm(str(tiny)) as server:
        with Client(server.url) as client:
            client.load("math", adapters[0])
        yield server


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def rows(adapters: list[Path], tokenizer: Any, tmp_path: Path) -> Path:
    """Three questions; the second has the answer that the first adapter gives."""
    expected = ["one", tokenizer.decode(answer_of(adapters[0])), "three"]
    lines = []
    for number, answer in enumerate(expected):
        asked = {"role": "user", "content": f"What is {number}?"}
        messages = [asked, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def asking(server: FakeVLLM, rows: Path, target: str = "math", **options: Any) -> Request:
    return Request(
        target=target, url=f"{server.url}/v1", data=str(rows), generate=True, rule="exact",
        **options,
    )  # fmt: skip


def said(request: Request) -> list[str]:
    lines: list[str] = []
    served.evaluate_served(request, lines.append)
    return "\n".join(lines).splitlines()


def test_base_beside_adapter(
    vllm: FakeVLLM, rows: Path, tokenizer: Any, adapters: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    sampling = {"temperature": 0.5, "seed": 7, "max_new_tokens": 6}
    lines = said(asking(vllm, rows, sampling=sampling, out=str(out)))
    (model,) = vllm.adapters
    assert lines[1] == (
        f"answers: to the last question of all 3 rows of these, by {BASE} and {model} at"
        f" {vllm.url}/v1"
    )
    assert lines[2].split(maxsplit=1) == ["base", "0 of 3 right (0.0%)"]
    assert lines[3].split(maxsplit=1) == ["adapter", "1 of 3 right (33.3%)"]
    assert lines[4].startswith("no loss: a server gives answers alone")
    assert lines[5] == (
        "cut at 6 tokens (--max-new-tokens): 3 of 3 by the base, 3 of 3 by the adapter"
    )
    assert lines[7] == "the first 3 by exact, + right, - wrong:"
    assert lines[-1] == f"wrote {out}"

    record = json.loads(out.read_text())
    assert record["served"] == {"adapter": model, "base": BASE}
    assert record["adapter"] == {"right": 1, "accuracy": pytest.approx(1 / 3), "cut": 3}
    texts = {row["adapter"]["answer"] for row in record["answers"]}
    assert texts == {tokenizer.decode(answer_of(adapters[0]), skip_special_tokens=True)}
    assert record["answers"][1]["adapter"]["right"] and not record["answers"][1]["base"]["right"]

    # Transformers' own tokens of the questions, each with a seed of its own.
    expected = {}
    for number, row in enumerate(read_jsonl(rows)):
        tokens = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
        expected[7 + number] = tokens["input_ids"]
    for name in (model, BASE):
        bodies = [body for body in vllm.asked if body["model"] == name]
        assert {body["seed"]: body["prompt"] for body in bodies} == expected
    # Nothing is left to defaults that a server takes from the model's generation_config.json.
    assert vllm.asked[0].items() >= {
        "max_tokens": 6, "temperature": 0.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "ignore_eos": True,
    }.items()  # fmt: skip
    assert vllm.asked[0]["stop_token_ids"] == [tokenizer.eos_token_id]


def test_answers_that_end_by_themselves_and_a_base_alone(vllm: FakeVLLM, rows: Path) -> None:
    vllm.finish_reason = "stop"
    lines = said(asking(vllm, rows, target=BASE, limit=2))
    assert lines[1].startswith("answers: to the last question of the first 2 rows of these, by")
    assert [line.split()[0] for line in lines[2:4]] == ["base", "no"]
    assert not any(line.startswith(("cut", "adapter")) for line in lines)
    assert {body["model"] for body in vllm.asked} == {BASE}


def test_one_version_from_the_first_question_to_the_last(
    vllm: FakeVLLM, rows: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that comes meanwhile is not mixed into the answers."""
    (model,) = vllm.adapters
    # One question after the other, so that the new version is there before the second.
    monkeypatch.setattr(served, "AT_ONCE", 1)

    def load() -> None:
        vllm.adapters.setdefault("math@new", (str(adapters[1]), answer_of(adapters[1])))

    vllm.before_binding = load
    lines = said(asking(vllm, rows))
    assert "1 of 3 right" in lines[3]
    assert {body["model"] for body in vllm.asked} == {model, BASE}


def test_a_folder_is_found_by_its_contents(
    vllm: FakeVLLM, rows: Path, adapters: list[Path]
) -> None:
    (model,) = vllm.adapters
    # Loaded later under the folder's own name, with other contents.
    with Client(vllm.url) as client:
        client.load("of-0", adapters[1])
        assert "1 of 3 right" in said(asking(vllm, rows, target=str(adapters[0])))[3]
        assert {body["model"] for body in vllm.asked} == {model, BASE}
        # A label stands before the hash.
        client.swap("math", adapters[0], version="step-5")
        client.unload("of-0")
    assert "1 of 3 right" in said(asking(vllm, rows, target=str(adapters[0])))[3]
    with pytest.raises(ValueError) as caught:
        said(asking(vllm, rows, target=str(adapters[1])))
    assert f"does not serve the contents of {adapters[1]} (" in str(caught.value)
    assert f"Load it (megalora swap {vllm.url} NAME={adapters[1]})" in str(caught.value)


class Pool(ThreadPoolExecutor):
    """Fails at once where requests would wait for each other, and the test below for ever."""

    def __init__(self, workers: int) -> None:
        assert workers >= 32
        super().__init__(workers)


def test_all_questions_are_under_way_together(
    vllm: FakeVLLM, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "ThreadPoolExecutor", Pool)
    vllm.may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        lines = pool.submit(said, asking(vllm, rows))
        try:
            # Three questions to the adapter, and three to the base, before any answer.
            wait_until(lambda: len(vllm.asked) == 6 or lines.done())
        finally:
            vllm.may_answer.set()
    assert "1 of 3 right" in lines.result()[3]
    assert len(vllm.asked) == 6


def test_a_row_that_the_server_refuses_has_its_number(vllm: FakeVLLM, rows: Path) -> None:
    row = read_jsonl(rows)[0]
    row["messages"][0]["content"] = "many words " * LONGEST
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError) as caught:
        said(asking(vllm, rows))
    assert str(caught.value).startswith(f"{rows}, row 4: asking ")
    assert str(caught.value).endswith(f"This model's maximum context length is {LONGEST} tokens.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("maths --url {url} --generate --data {rows}", "{url} serves no 'maths'; it serves "),
        ("math --url {url} --generate", "evaluate math on what? Give --data FILE"),
        ("{tmp} --url {url} --generate --data {rows}", "{tmp} is neither a name that {url} has"),
        ("math --url {url} --generate --data {rows} --nproc 2", "--nproc and parallel.* have no"),
        ("math --url {url} --generate --data {rows} parallel.tp=2", "--nproc and parallel.* have"),
        ("math --url {url} --generate --data {rows} --base ./no", "--base=./no: no such folder"),
    ],
)
def test_mistakes(
    arguments: str, message: str, vllm: FakeVLLM, rows: Path, tmp_path: Path, refused: Said
) -> None:
    names = {"url": vllm.url, "rows": rows, "tmp": tmp_path}
    words = [word.format(**names) for word in arguments.split()]
    assert refused("eval", *words).startswith(message.format(**names))
    assert vllm.asked == []
