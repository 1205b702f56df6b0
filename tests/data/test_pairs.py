"""Pairs of answers against TRL's own preparation of the same rows, and what is refused."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from trl.data_utils import maybe_extract_prompt
from trl.trainer.dpo_trainer import DPOConfig, DPOTrainer

from megalora.data.batch import flat_row
from megalora.data.chat import encode_conversation
from megalora.data.columns import resolve_columns
from megalora.data.pairs import joined_pair, resolve_pair, to_pair
from megalora.data.samples import digest_of_samples
from megalora.data.splits import Split, load_split, split_off_eval
from megalora.data.template import ChatTemplate
from tests.data.chat_tokenizer import make_tokenizer
from tests.jsonl import write_jsonl

USER = {"role": "user", "content": "What is the sum?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TURNS = [USER, said("Of what?"), {"role": "user", "content": "4 and 5"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    # The prompt in a column of its own, as text and as messages.
    "prompt as text": [{"prompt": "Hi", "chosen": "Good day", "rejected": "What do you want?"}],
    "prompt as messages": [
        {"prompt": [SYSTEM, *TURNS], "chosen": [said("9")], "rejected": [said("45, I think")]}
    ],
    # What both conversations begin with.
    "implicit prompt": [
        {"chosen": [USER, said("9")], "rejected": [USER, said("no idea")]},
        {"chosen": [*TURNS, said("9.")], "rejected": [*TURNS, said("It is 8.")]},
    ],
    # As in UltraFeedback: the prompt as text, and once more at the head of both conversations.
    "prompt and whole conversations": [
        {"prompt": USER["content"], "chosen": [USER, said("9")], "rejected": [USER, said("8, no")]}
    ],
    "the answers begin alike": [
        {"prompt": [USER], "chosen": [said("It is 9")], "rejected": [said("It is 8, or so")]},
    ],
}  # fmt: skip


def by_trl(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Prompt and answers as tokens, by TRL's trainer."""
    # It takes messages, or texts without a template; ours puts texts into messages.
    as_messages = []
    for row in rows:
        # TRL takes the prompt from the conversations where these have it.
        made = dict(maybe_extract_prompt(row))
        for key, value in list(made.items()):
            if isinstance(value, str):
                role = "user" if key == "prompt" else "assistant"
                made[key] = [{"role": role, "content": value}]
        as_messages.append(made)
    me = SimpleNamespace(_tokenizer=tokenizer)
    args = DPOConfig(max_length=None, report_to=[], bf16=False, use_cpu=True)
    found = DPOTrainer._prepare_dataset(
        me, Dataset.from_list(as_messages), tokenizer, args, "pairs"
    )
    return list(found)


def load(tmp_path: Any, rows: list[dict[str, Any]], **options: Any) -> Split:
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    options = {"format": "auto", "max_length": 200, **options}
    return load_split(str(tmp_path / "pairs.jsonl"), make_tokenizer(), pairs=True, **options)


@pytest.mark.parametrize("case", ROWS)
def test_tokens_and_targets_are_trl_s(case: str, tmp_path) -> None:
    tokenizer = make_tokenizer()
    newline = tokenizer("\n")["input_ids"]
    split = load(tmp_path, ROWS[case])
    assert split.pairs and len(split.samples) == len(ROWS[case])
    for sample, expected in zip(split.samples, by_trl(ROWS[case], tokenizer), strict=True):
        for side, (ids, mask) in zip(("chosen", "rejected"), sample.sequences, strict=True):
            answer = expected[f"{side}_ids"]
            assert ids.tolist() == expected["prompt_ids"] + answer
            # Behind the end of the turn the template writes a line break, which no server waits
            # for: TRL has it in the loss, we do not.
            assert answer[-1:] == newline
            learned = np.flatnonzero(mask).tolist()
            first = len(expected["prompt_ids"])
            assert learned == list(range(first, len(ids) - 1))


def test_a_prompt_that_the_answers_repeat_is_said_once() -> None:
    """As in UltraFeedback: a prompt column, and whole conversations."""
    for prompt in ("What is the sum?", [USER]):
        for head in ([USER], [SYSTEM, USER]):
            row = {
                "prompt": prompt,
                "chosen": [*head, said("9")],
                "rejected": [*head, said("8")],
            }
            columns = resolve_pair("auto", row)
            for side, text in zip(to_pair(row, columns), ("9", "8"), strict=True):
                assert side.messages == [*head, said(text)]
                assert side.num_context == len(head)


def test_conversations_in_other_forms() -> None:
    """ShareGPT's turns, and messages as JSON text with or without a prompt of its own."""
    sharegpt = [{"from": "human", "value": "What is the sum?"}, {"from": "gpt", "value": "9"}]
    as_text = json.dumps([USER, said("9")])
    for chosen in (sharegpt, json.dumps(sharegpt), as_text):
        for prompt in ({}, {"prompt": ""}, {"prompt": "What is the sum?"}):
            row = {**prompt, "chosen": chosen, "rejected": [USER, said("8")]}
            columns = resolve_pair("auto", row)
            for side, text in zip(to_pair(row, columns), ("9", "8"), strict=True):
                assert side.messages == [USER, said(text)] and side.num_context == 1
    # A text that only begins with a bracket is an answer.
    row = {"prompt": "Count", "chosen": "[1, 2]", "rejected": "[1"}
    found = [side.messages[-1]["content"] for side in to_pair(row, resolve_pair("auto", row))]
    assert found == ["[1, 2]", "[1"]
    # The prompt's input is not in the conversations that repeat the prompt.
    columns = {"prompt": "p", "input": "i", "chosen": "c", "rejected": "r"}
    row = {"p": "What is the sum?", "i": "4, 5", "c": [USER, said("9")], "r": [USER, said("8")]}
    with pytest.raises(ValueError, match="column 'i' belongs to the prompt, which column 'c'"):
        to_pair(row, columns)


def test_what_is_common_is_context() -> None:
    """Of two conversations that go on for different lengths the last message stays an answer."""
    columns = {"chosen": "chosen", "rejected": "rejected"}
    row = {"chosen": [USER, said("9")], "rejected": [USER, said("9"), USER, said("8")]}
    chosen, rejected = to_pair(row, columns)
    assert chosen.num_context == rejected.num_context == 1
    # A prompt of its own column says where it ends, whatever the answers have in common.
    alike = [said("9"), {"role": "user", "content": "Sure?"}]
    row = {"prompt": [USER], "chosen": [*alike, said("Yes")], "rejected": [*alike, said("No")]}
    chosen, rejected = to_pair(row, {"prompt": "prompt", **columns})
    assert chosen.num_context == rejected.num_context == 1
    row = {"chosen": [USER, said("9")], "rejected": [USER, said("9"), USER, said("8")]}
    # With a system prompt of its own column, which is context too.
    with_system = {**row, "system": "Be brief."}
    chosen, rejected = to_pair(with_system, columns)
    assert chosen.messages[0] == SYSTEM and chosen.num_context == rejected.num_context == 2


def test_a_row_of_two_sequences(tmp_path) -> None:
    """The chosen sequence, then the rejected one, each with labels of its own."""
    split = load(tmp_path, ROWS["implicit prompt"])
    samples = list(split.samples)
    row = flat_row(samples, filler=np.array([7]), multiple_of=50)
    ends = [0]
    for sample in samples:
        for ids, mask in sample.sequences:
            start = ends[-1]
            ends.append(start + len(ids) - 1)
            assert row.tokens[start : ends[-1]].tolist() == ids[:-1].tolist()
            assert row.labels[start : ends[-1]].tolist() == ids[1:].tolist()
            assert row.loss_mask[start : ends[-1]].tolist() == mask[1:].tolist()
    assert row.ends[:5] == tuple(ends) and row.num_sequences == 4
    targets = [int(mask.sum()) for sample in samples for _, mask in sample.sequences]
    assert row.targets == targets and len(set(targets)) > 1
    numbers = row.sequence_numbers
    assert numbers[: ends[-1]].tolist() == np.repeat(range(4), np.diff(ends)).tolist()
    assert (numbers[ends[-1] :] >= 4).all() and len(numbers) == len(row.tokens)
    # As many tokens as a sample takes in a row.
    assert split.row_lengths.tolist() == [ends[2], ends[4] - ends[2]]
    assert split.sample_lengths.tolist() == [len(s.input_ids) for s in samples]


def test_each_sequence_has_the_limit_for_itself(tmp_path) -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c" * 60},
        {"prompt": "a", "chosen": "b" * 40, "rejected": "c" * 40},
        {"prompt": "a", "chosen": "b" * 60, "rejected": "c"},
    ]
    lengths = [[len(ids) for ids, _ in s.sequences] for s in load(tmp_path, rows).samples]
    assert [max(pair) for pair in lengths] == [lengths[0][1], lengths[1][0], lengths[2][0]]
    limit = max(lengths[1])
    # Both together are longer than the limit.
    assert sum(lengths[1]) > limit < lengths[0][1]
    split = load(tmp_path, rows, max_length=limit)
    assert [len(s.input_ids) for s in split.samples] == [sum(lengths[1])]
    assert split.fit.num_too_long == 2 and split.fit.longest == lengths[0][1]
    assert split.lengths.tolist() == [max(pair) for pair in lengths]


def test_pairs_with_nothing_to_learn_are_left_out(tmp_path) -> None:
    rows = [
        *ROWS["implicit prompt"],
        {"chosen": [USER, said("9")], "rejected": [USER, said("9")]},
        {"chosen": [USER, {**said("9"), "weight": 0}], "rejected": [USER, said("8")]},
    ]
    split = load(tmp_path, rows)
    assert len(split.samples) == 2 and split.fit.num_no_target == 2
    assert "2 without a token in the loss were left out" in split.summary()
    assert ": 2 pairs, " in split.summary()


def test_pairs_are_stored_apart_from_conversations(tmp_path) -> None:
    """One file may be read in both ways; the digest of a run tells which."""
    rows = [{**row, "messages": row["chosen"]} for row in ROWS["implicit prompt"]]
    pairs = load(tmp_path, rows)
    source = str(tmp_path / "pairs.jsonl")
    chosen = load_split(source, make_tokenizer(), format="auto", max_length=200)
    assert [len(s.sequences) for s in chosen.samples] == [1, 1]
    assert digest_of_samples(pairs.samples) != digest_of_samples(chosen.samples)
    # The store packs the mask into the ids, and knows where the second sequence begins.
    template = ChatTemplate(make_tokenizer())
    columns = {"chosen": "chosen", "rejected": "rejected"}
    for row, stored in zip(rows, pairs.samples, strict=True):
        sides = [encode_conversation(side, template) for side in to_pair(row, columns)]
        made = joined_pair(*sides)
        assert stored.second == made.second == len(sides[0].input_ids)
        assert np.array_equal(stored.input_ids, made.input_ids)
        assert np.array_equal(stored.loss_mask, made.loss_mask)
    train, held_out = split_off_eval(pairs, 1, seed=0)
    assert train.pairs and held_out.pairs


@pytest.mark.parametrize(
    ("format", "columns", "message"),
    [
        ("auto", ["messages"], "columns 'chosen' and 'rejected', because .* there are messages"),
        ("trl", ["chosen"], "data.format='trl' is not known; use auto, or data.format={prompt: "),
        ({"messages": "m"}, ["m"], "maps other keys than it can; use data.format={prompt: COLU"),
        ({"chosen": "good", "rejected": "bad"}, ["good"], "rejected is mapped to 'bad', but"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit(format, columns, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_pair(format, columns)


def test_supervised_training_on_pairs_names_the_objective() -> None:
    with pytest.raises(ValueError, match=r"there are chosen, rejected[\s\S]*with objective.name"):
        resolve_columns("auto", ["chosen", "rejected"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": "Human: q", "rejected": "8"},
            r"no column holds its prompt; use data.format={prompt: COLUMN, chosen: COLUMN, rejected"
            r": COLUMN}, or the last two alone, or write the conversation as messages$",
        ),
        ({"prompt": "", "chosen": "9", "rejected": "8"}, "no column holds its prompt"),
        # A conversation beside a prompt that it does not begin with would say it twice.
        (
            {"prompt": "What is the sum? ", "chosen": [USER, said("9")], "rejected": [said("8")]},
            "a whole conversation that does not begin with 'prompt'.*leave that out: data.format={",
        ),
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, said("9")], "rejected": [USER, said("8")]},
            "a whole conversation that does not begin with 'prompt'",
        ),
        (
            {"chosen": [USER, said("9")], "rejected": [{**USER, "content": "?"}, said("8")]},
            "part at message 1, which is not an assistant's in both of them",
        ),
        ({"prompt": "q", "chosen": 9, "rejected": "8"}, "'chosen' must hold a string or a list"),
        ({"prompt": "q", "chosen": "9"}, "'rejected' must hold a string or a list .* got NoneType"),
        (
            {"prompt": "q", "chosen": "9", "rejected": "8", "images": ["x"]},
            "'images' belongs to",
        ),
    ],
)  # fmt: skip
def test_rows_that_are_refused(row, message: str) -> None:
    columns = {
        key: key for key in ("prompt", "chosen", "rejected") if key != "prompt" or key in row
    }
    with pytest.raises(ValueError, match=message):
        to_pair(row, columns)
