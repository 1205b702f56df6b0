"""Environments of verifiers, as they are: what they say, sample and reward in a run of ours.

They run where verifiers is installed (``make test-verifiers``): it wants earlier data sets than
TRL, against which other tests compare.
"""

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megalora.data.conversation import Conversation
from megalora.rl.environment import load_environment
from megalora.rl.episode import Episode
from tests.data.chat_tokenizer import make_tokenizer
from tests.data.templates import TEMPLATES
from tests.jsonl import read_jsonl
from tests.rl.told import Engine, play, told

pytestmark = pytest.mark.verifiers

# An environment is a module with this function.
MODULE = '''
import verifiers as vf
from datasets import Dataset

ROWS = Dataset.from_list([
    {"question": "What is 2 + 3?", "answer": "5"}, {"question": "What is 4 + 3?", "answer": "7"},
])


def right(completion, answer, **kwargs):
    return float(answer in completion[-1]["content"])


def number_of_turns(state):
    return len(state["trajectory"]) / 10


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Asks(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": "Are you sure?"}]


class Forgets(Asks):
    async def get_prompt_messages(self, state):
        said = await self.env_response([], state)
        return state["prompt"][-1:] + said * len(state["trajectory"])


class Prepends(vf.SingleTurnEnv):
    async def setup_state(self, state):
        state["prompt"] = [vf.SystemMessage(content="Be kind."), *state["prompt"]]


class Samples(vf.SingleTurnEnv):
    async def get_model_response(self, state, prompt, **kwargs):
        return await super().get_model_response(state, prompt, sampling_args={"temperature": 0.1})


def compared(completions, **kwargs):
    return [1.0 for _ in completions]


def load_environment(kind="single"):
    rubric = vf.Rubric(funcs=[right, number_of_turns])
    if kind == "single":
        return vf.SingleTurnEnv(dataset=ROWS, rubric=rubric, system_prompt="Be short.")
    if kind == "turns":
        return Asks(dataset=ROWS, rubric=rubric, max_turns=2)
    if kind == "tools":
        return vf.ToolEnv(dataset=ROWS, rubric=rubric, tools=[add])
    if kind == "prepends":
        return Prepends(dataset=ROWS, rubric=rubric)
    if kind == "samples":
        return Samples(dataset=ROWS, rubric=rubric)
    if kind == "forgets":
        return Forgets(dataset=ROWS, rubric=rubric, max_turns=3)
    return vf.SingleTurnEnv(dataset=ROWS, rubric=vf.Rubric(funcs=[compared]))
'''
KINDS = ("single", "turns", "tools", "forgets", "prepends", "samples", "groups")


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules ``made_KIND``."""
    for kind in KINDS:
        text = MODULE.replace('kind="single"', f'kind="{kind}"')
        (tmp_path / f"made_{kind}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for kind in KINDS:
        sys.modules.pop(f"made_{kind}", None)


def rows_of(kind: str, tmp_path: Path) -> list[dict[str, Any]]:
    from megalora.rl.of_verifiers import write_rows

    out = tmp_path / "rows.jsonl"
    assert write_rows(f"made-{kind}", out) == 2
    return read_jsonl(out)


def lead(kind: str, tmp_path: Path, *texts: str, **options: Any) -> tuple[Episode, Engine, Any]:
    """An episode on the first row, with an engine that answers with these texts."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES["prints tools"]
    row = rows_of(kind, tmp_path)[0]
    conversation = Conversation(messages=row["prompt"], tools=row.get("tools"))
    engine = told(tokenizer, *texts, **{k: v for k, v in options.items() if k == "cut"})
    episode = play(f"verifiers:made-{kind}", engine, tokenizer, conversation=conversation, row=row)
    return episode, engine, tokenizer


@pytest.mark.usefixtures("environments")
def test_one_turn(tmp_path: Path) -> None:
    episode, engine, tokenizer = lead("single", tmp_path, "It is 5")
    # Its system prompt is part of the rows, so that it is tokenised as in training.
    asked = tokenizer.decode(engine.asked[0])
    assert "Be short." in asked and "What is 2 + 3?" in asked
    # Columns of its own stay, which its rewards may read.
    assert episode.prompt.row["question"] == "What is 2 + 3?"
    # Both reward functions, with weight 1.
    assert episode.reward == pytest.approx(1.1)
    assert episode.completion_ids == engine.answers[0]


@pytest.mark.usefixtures("environments")
def test_a_run_loads_it_in_a_thread_and_keeps_its_handlers() -> None:
    def handler(number: int, frame: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    try:
        load_environment("verifiers:made-single")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(load_environment, "verifiers:made-single").result()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("environments")
def test_turns(tmp_path: Path) -> None:
    episode, engine, tokenizer = lead("turns", tmp_path, "It is 6", "It is 5")
    assert engine.asked[1][: len(engine.asked[0]) + len(engine.answers[0])] == [
        *engine.asked[0], *engine.answers[0],
    ]  # fmt: skip
    assert "Are you sure?" in tokenizer.decode(engine.asked[1])
    assert episode.reward == pytest.approx(1.2)
    # What the environment says is not learned.
    first, last = map(len, engine.answers)
    given = len(episode.mask) - first - last
    assert episode.mask == [1] * first + [0] * given + [1] * last


@pytest.mark.usefixtures("environments")
def test_a_tool_is_called(tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
    episode, engine, tokenizer = lead("tools", tmp_path, f"I add. {call}", "It is 5")
    # The model is told of the tool, and reads what it returned.
    assert '"add"' in tokenizer.decode(engine.asked[0])
    assert "<|im_start|>tool\n5<|im_end|>" in tokenizer.decode(engine.asked[1])
    # Its own metrics of calls have no weight.
    assert episode.reward == pytest.approx(1.2)


@pytest.mark.usefixtures("environments")
def test_a_call_that_is_no_json_is_answered(tmp_path: Path) -> None:
    episode, engine, _ = lead("tools", tmp_path, "<tool_call>add 2 3</tool_call>", "It is 5")
    assert len(engine.asked) == 2 and episode.reward == pytest.approx(1.2)


@pytest.mark.usefixtures("environments")
def test_an_answer_that_is_cut_is_rewarded(tmp_path: Path) -> None:
    episode, engine, _ = lead("turns", tmp_path, "It is 5", cut=True)
    assert len(engine.asked) == 1
    assert (episode.truncated, episode.reward) == (True, pytest.approx(1.1))


@pytest.mark.usefixtures("environments")
def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="changed what was said before"):
        lead("forgets", tmp_path, "one", "two", "three")
    with pytest.raises(ValueError, match="changed what was said before"):
        lead("prepends", tmp_path, "one")
    with pytest.raises(ValueError, match=r"asks for sampling options \(temperature\)"):
        lead("samples", tmp_path, "one")
    with pytest.raises(ValueError, match="rewards whole groups together"):
        rows_of("groups", tmp_path)
    tokenizer = make_tokenizer()
    engine = told(tokenizer, "5")
    # Rows that nobody wrote for it.
    with pytest.raises(ValueError, match="the row has no column prompt"):
        play("verifiers:made-single", engine, tokenizer, row={"question": "x"})
    # Rows that were written before the environment had its tools.
    row = rows_of("tools", tmp_path)[0]
    del row["tools"]
    conversation = Conversation(messages=row["prompt"])
    with pytest.raises(ValueError, match="tools that the row's prompt does not name"):
        play("verifiers:made-tools", engine, tokenizer, conversation=conversation, row=row)
    with pytest.raises(ValueError, match=r"rl.environment: verifiers:nowhere: .*nowhere"):
        play("verifiers:nowhere", engine, tokenizer, row=row)
