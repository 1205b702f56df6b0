"""Conversations that environments lead: which tokens they have, and what is learned of them."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalora.data.conversation import Conversation
from megalora.data.template import ChatTemplate
from megalora.rl.conversation import Client, Truncated
from megalora.rl.environment import load_environment
from megalora.rl.episode import Sampled
from megalora.rl.new_text import NewText
from megalora.rl.rewards.failures import Failures
from recipes.calculator.environment import calculate
from tests.data.chat_tokenizer import make_tokenizer
from tests.data.templates import TEMPLATES
from tests.rl.told import play, told, twice

CALCULATOR = "recipes/calculator/environment.py:rollout"


def test_one_answer() -> None:
    tokenizer = make_tokenizer()
    engine = told(tokenizer, "It is 42")
    episode = play(None, engine, tokenizer, weights={"last-number": 2.0}, expected="42")
    assert engine.asked == [episode.prompt.tokens]
    assert episode.completion_ids == engine.answers[0]
    assert episode.mask == [1] * len(episode.completion_ids)
    assert episode.logprobs == [-1 - place / 100 for place in range(len(episode.mask))]
    assert (episode.text, episode.reward, episode.rewards) == ("It is 42", 2, {"last-number": 1})
    assert (episode.sample, episode.truncated) == (3, False)
    assert episode.routes is not None
    assert len(episode.routes) == len(episode.prompt.tokens) + len(episode.completion_ids) - 1


# Llama 2's template has no system message and no header, and prints a space before the end.
@pytest.mark.parametrize("template", ["chatml", "qwen3", "marked_open", "llama2"])
def test_tokens_are_those_of_the_whole_conversation(template: str) -> None:
    """Where the model writes the tokens that its own text has, the second question is the
    template's text of everything, tokenised at once."""
    tokenizer = make_tokenizer(template)
    engine = told(tokenizer, "The answer is forty", "two")
    play(twice, engine, tokenizer)
    whole = [
        {"role": "user", "content": "What is the sum?"},
        {"role": "assistant", "content": "The answer is forty"},
        {"role": "user", "content": "Good morning to you"},
    ]
    wanted = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert isinstance(wanted, str)
    if template == "llama2":
        # What the template prints around an answer was not sampled here.
        wanted = wanted.replace(" The answer is forty <", "The answer is forty<")
    assert engine.asked[1] == tokenizer.encode(wanted, add_special_tokens=False)


def test_given_tokens_are_not_learned() -> None:
    tokenizer = make_tokenizer()
    engine = told(tokenizer, "forty", "two and two")
    episode = play(twice, engine, tokenizer)
    first, last = map(len, engine.answers)
    given = len(episode.completion_ids) - first - last
    assert given > 10
    assert episode.mask == [1] * first + [0] * given + [1] * last
    for logprob, learned in zip(episode.logprobs, episode.mask, strict=True):
        assert (logprob is not None) == bool(learned)
    # A given token has the version of the one before.
    assert episode.versions == [0] * (first + given) + [10] * last
    assert (episode.reward, episode.rewards) == (0.5, {"environment": 0.5})
    assert episode.text == "forty\nuser\nGood morning to you\nassistant\ntwo and two"


def test_an_answer_that_is_cut_ends_the_conversation() -> None:
    tokenizer = make_tokenizer()
    replies: list[bool] = []

    async def goes_on(client: Client, row: dict[str, Any]) -> float:
        for _ in range(5):
            replies.append((await client.generate()).ended)
            client.add("And now?")
        return 1.0

    engine = told(tokenizer, "forty", "two", cut=True)
    episode = play(goes_on, engine, tokenizer)
    assert (len(engine.asked), replies) == (2, [True, False])
    # It never came to its return, and no other reward judges.
    assert (episode.truncated, episode.reward, episode.rewards) == (True, None, {})
    engine = told(tokenizer, "forty", "so 2", cut=True)
    episode = play(goes_on, engine, tokenizer, weights={"last-number": 1.0}, expected="2")
    assert (episode.truncated, episode.reward) == (True, 1.0)


@pytest.mark.parametrize("spare", [-1, 0, 1, 2, 3, 4])
def test_the_limit_on_all_tokens(spare: int) -> None:
    """``spare``: tokens that are left for the second answer, which has three and its end."""
    tokenizer = make_tokenizer()
    whole = play(twice, told(tokenizer, "forty", "xyz"), tokenizer)
    first = whole.mask.index(0)
    total = len(whole.prompt.tokens) + len(whole.completion_ids)
    engine = told(tokenizer, "forty", "xyz")
    episode = play(twice, engine, tokenizer, max_length=total - 4 + spare)
    assert len(engine.answers[1]) == 4
    if spare <= 0:
        # No room for an answer: what would have been given before it is left out.
        assert len(engine.asked) == 1
        assert episode.completion_ids == whole.completion_ids[:first]
        assert (episode.truncated, episode.reward) == (True, None)
        return
    kept = len(whole.completion_ids) - 4 + spare
    assert episode.completion_ids == whole.completion_ids[:kept]
    assert episode.logprobs == whole.logprobs[:kept]
    assert episode.mask == whole.mask[:kept] and episode.versions == whole.versions[:kept]
    assert episode.truncated is (spare < 4)
    assert episode.routes is not None and whole.routes is not None
    np.testing.assert_array_equal(
        episode.routes, whole.routes[: len(whole.prompt.tokens) + kept - 1]
    )


@pytest.mark.slow
def test_the_tokens_given_are_those_of_trl() -> None:
    """TRL 1.16 writes what a tool says between the end of an answer and the next one."""
    trl = pytest.importorskip("trl")
    tokenizer = make_tokenizer("qwen3")
    trainer = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    trainer.processing_class = tokenizer
    trainer._tokenizer = tokenizer
    trainer._is_vlm = False
    trainer.chat_template = tokenizer.chat_template
    trainer.chat_template_kwargs = {}
    messages = [{"role": "tool", "name": "sum", "content": "forty two"}]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ours = NewText(ChatTemplate(tokenizer)).tokens(messages, end)
    assert ours == trainer._get_tool_suffix_ids(messages) and len(ours) > 5


def test_template_options_of_the_prompt_hold_for_all_turns() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES["chatml"].replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n' + (mood or '') + '"
    )
    like = Conversation(messages=[], options={"mood": "calm "})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    new = [{"role": "user", "content": "And now?"}]
    text = tokenizer.decode(NewText(ChatTemplate(tokenizer), like).tokens(new, end))
    assert text == "\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\ncalm "


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ("none", "ended without an answer: await client.generate()"),
        ("text", "gave str 'good'; a reward is a number"),
        ("nan", "a: gave nan; a reward is a finite number"),
        ("part", "a: gave None; where there are several, each is a number"),
        ("broken", "KeyError: 'no such column' (test_environment.py, line"),
        ("again", "ValueError: client.generate: nothing was added since the last answer (test_env"),
        ("early", "ValueError: client.generate: the prompt ends where the assistant answers; noth"),
        ("both", "ValueError: client.generate: another answer of this conversation is awaited (te"),
        ("malformed", "ValueError: message 2 has no 'content' (its keys: role)"),
        ("slow", "took longer than 0.2 s between two answers"),
        ("own", "TimeoutError (test_environment.py, line"),
        # Neither the run's end, nor the end of its event loop.
        ("exit", "SystemExit"),
        ("cancelled", "CancelledError"),
    ],
)
def test_an_environment_that_fails(rollout: str, message: str) -> None:
    """It ends the run, or is counted and leaves the completion out."""

    async def lead(client: Client, row: dict[str, Any]) -> Any:
        if rollout == "none":
            return 1.0
        if rollout == "early":
            client.add("hello")
        if rollout == "both":
            await asyncio.gather(client.generate(), client.generate())
        await client.generate()
        if rollout == "again":
            await client.generate()
        if rollout == "malformed":
            await client.generate([{"role": "user"}])
        if rollout == "slow":
            # Ends in the end, so that a limit that is not kept fails the test.
            await asyncio.sleep(5)
        if rollout == "own":
            raise TimeoutError
        if rollout == "exit":
            sys.exit("enough")
        if rollout == "cancelled":
            task = asyncio.ensure_future(asyncio.sleep(5))
            task.cancel()
            await task
        if rollout == "broken":
            return row["no such column"]
        return {"text": "good", "nan": {"a": float("nan")}, "part": {"a": None}}[rollout]

    tokenizer = make_tokenizer()
    limit_s = 0.2 if rollout == "slow" else 600
    with pytest.raises(ValueError) as caught:
        play(lead, told(tokenizer, "yes"), tokenizer, timeout_s=limit_s)
    assert str(caught.value).startswith(f"rl.environment: mine:rollout: {message}")
    assert "; row {'question': 'sum'}" in str(caught.value)
    failures = Failures("leave_out", lambda line: None)
    engine = told(tokenizer, "yes")
    episode = play(lead, engine, tokenizer, failures=failures, timeout_s=limit_s)
    assert (episode.reward, episode.rewards) == (None, {})
    # Of a completion without a token nothing could be recorded, such as its version.
    assert episode.completion_ids == engine.answers[0]
    assert failures.counts == {"mine:rollout": 1}


def test_the_engine_s_time_is_not_the_environment_s() -> None:
    tokenizer = make_tokenizer()
    engine = told(tokenizer, "yes")

    async def slow(tokens: Sequence[int]) -> Sampled:
        await asyncio.sleep(0.5)
        return await engine(tokens)

    assert play(None, slow, tokenizer, weights={"exact": 1.0}, expected="yes", timeout_s=0.3).reward


@pytest.mark.parametrize("swallows", [True, False])
def test_an_engine_that_fails_is_not_the_environment_s_failure(swallows: bool) -> None:
    """It ends the run, whatever is done where a completion cannot be judged."""

    async def down(tokens: Sequence[int]) -> Sampled:
        raise ConnectionError("no server")

    async def lead(client: Client, row: dict[str, Any]) -> float:
        try:
            await client.generate()
        except Exception:
            if not swallows:
                raise
        return 0.0

    failures = Failures("leave_out", lambda line: None)
    with pytest.raises(ConnectionError, match="no server"):
        play(lead, down, make_tokenizer(), failures=failures)
    assert not failures.counts


def test_rewards_of_the_environment_and_of_functions_add_up() -> None:
    async def several(client: Client, row: dict[str, Any]) -> dict[str, float]:
        reply = await client.generate()
        assert client.messages == [{"role": "assistant", "content": reply.text}]
        return {"a": 0.25, "b": True}

    tokenizer = make_tokenizer()
    weights = {"last-number": 4.0}
    episode = play(several, told(tokenizer, "42"), tokenizer, weights=weights, expected="42")
    assert episode.rewards == {"a": 0.25, "b": 1.0, "last-number": 1.0}
    assert episode.reward == 5.25


def test_an_environment_may_judge_what_was_cut() -> None:
    async def lead(client: Client, row: dict[str, Any]) -> float:
        try:
            await client.generate()
            await client.generate("And?")
        except Truncated:
            return -1.0
        return 1.0

    tokenizer = make_tokenizer()
    episode = play(lead, told(tokenizer, "forty", cut=True), tokenizer)
    assert (episode.reward, episode.truncated) == (-1.0, True)


def test_the_calculator() -> None:
    """Two calls, of which the second is no sum; the reward reads the last number."""
    tokenizer = make_tokenizer()
    engine = told(
        tokenizer, "<calc>6 * (3 + 4)</calc>", "so <calc>x.y()</calc>", "The answer is 42."
    )
    weights = {"last-number": 1.0}
    episode = play(CALCULATOR, engine, tokenizer, weights=weights, expected="#### 42")
    assert episode.reward == 1.0
    said = tokenizer.decode(episode.completion_ids)
    assert said.count("<|im_start|>user\n<result>42</result><|im_end|>") == 1
    assert said.count("<|im_start|>user\n<result>error</result><|im_end|>") == 1
    is_learned = np.array(episode.mask, bool)
    sampled = np.concatenate(engine.answers)
    np.testing.assert_array_equal(np.array(episode.completion_ids)[is_learned], sampled)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2*3", 7), ("-(8 / 4)", -2), (" 2.5 ", 2.5), ("1 / 0", None), ("2 ** 9", None),
        ("9" * 400, None), ("len('a')", None), ("", None), ("(" * 9000, None), ("True", None),
    ],
)  # fmt: skip
def test_what_the_calculator_computes(text: str, value: float | None) -> None:
    assert calculate(text) == value


def test_environments_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "env.py").write_text("def plain(client, row): ...\nasync def one(client): ...\n")
    monkeypatch.chdir(tmp_path)
    for path, message in {
        "env.py:plain": "env.py:plain is not async; write async def and await client.generate",
        "env.py:one": "env.py:one: it is called as one(client, row): too many positional arguments",
        "verifiers:gsm8k": "verifiers:gsm8k: No module named 'verifiers'; install it: pip install",
        "env.py": "'env.py' is not module:function or file.py:function",
    }.items():
        with pytest.raises(ValueError) as caught:
            load_environment(path)
        assert str(caught.value).startswith(f"rl.environment: {message}")
