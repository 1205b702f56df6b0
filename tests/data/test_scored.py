"""Rows for a score head: labels and margins, the place that is scored, and what is refused."""

from typing import Any

import numpy as np
import pytest

from megalora.config import DataConfig, ObjectiveConfig
from megalora.data.batch import flat_row
from megalora.data.samples import digest_of_samples
from megalora.data.scored import Scoring
from megalora.data.splits import Split, load_data
from tests.data.chat_tokenizer import make_tokenizer
from tests.jsonl import write_jsonl

USER = {"role": "user", "content": "What is the sum?"}
NINE = {"role": "assistant", "content": "9"}
EIGHT = {"role": "assistant", "content": "8, or so"}
COLOURS = ObjectiveConfig(name="classify", labels=["red", "green", "blue"])
REWARD = ObjectiveConfig(name="reward")


def load(
    tmp_path: Any,
    rows: list[dict[str, Any]],
    objective: ObjectiveConfig = COLOURS,
    tokenizer: Any = None,
    **data: Any,
) -> Split:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(train=str(tmp_path / "rows.jsonl"), cache=str(tmp_path / "cache"), **data)
    return load_data(config, tokenizer or make_tokenizer(), objective=objective)[0]


def test_a_text_ends_in_the_place_that_is_scored(tmp_path) -> None:
    tokenizer = make_tokenizer()
    texts = ["a few words", "and some more of them"]
    split = load(tmp_path, [{"text": t, "label": i} for i, t in enumerate(texts)])
    for sample, text, label in zip(split.samples, texts, (0, 1), strict=True):
        ids = tokenizer(text)["input_ids"]
        assert sample.input_ids[:-1].tolist() == ids
        assert np.flatnonzero(sample.loss_mask).tolist() == [len(ids)]
        assert sample.value == label
    # All tokens of the texts are read, so each takes as many places in a row.
    row = flat_row(list(split.samples), filler=np.array([7]), multiple_of=64)
    every = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert row.tokens[: len(every)].tolist() == every
    assert split.row_lengths.sum() == len(every)
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert np.flatnonzero(row.loss_mask).tolist() == [lengths[0] - 1, sum(lengths) - 1]
    assert row.values == (0.0, 1.0)
    assert "2 samples" in split.summary() and "(2 scores)" in split.summary()


def test_messages_need_no_answer(tmp_path) -> None:
    tokenizer = make_tokenizer()
    split = load(tmp_path, [{"messages": [USER], "label": "blue"}])
    text = tokenizer.apply_chat_template([USER], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert split.samples[0].input_ids[:-1].tolist() == ids
    assert split.samples[0].value == 2


@pytest.mark.parametrize(
    ("label", "value"), [("green", 1), (2, 2), ("2", 2), (1.0, 1), (True, 1), (False, 0)]
)
def test_labels_are_names_or_numbers(label: Any, value: float, tmp_path) -> None:
    assert load(tmp_path, [{"text": "words", "label": label}]).samples[0].value == value


@pytest.mark.parametrize(
    ("names", "label", "value"),
    [
        (["1", "0"], 1, 0),
        (["1", "0"], "1", 0),
        (["1", "0"], 0.0, 1),
        (["1", "2", "3", "4", "5"], 4, 3),
        (["True", "False"], True, 0),
        (["true", "false"], False, 1),
    ],
)
def test_a_name_that_is_a_number_is_a_name(names: Any, label: Any, value: float, tmp_path) -> None:
    """In JSON as in a file of texts: the places of the names would be other labels."""
    named = ObjectiveConfig(name="classify", labels=names)
    assert load(tmp_path, [{"text": "words", "label": label}], named).samples[0].value == value


def test_one_label_is_a_value(tmp_path) -> None:
    one = ObjectiveConfig(name="classify", num_labels=1)
    split = load(tmp_path, [{"text": "words", "label": value} for value in (0.25, "-3")], one)
    assert [sample.value for sample in split.samples] == [0.25, -3.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "words", "label": 3}, "label int 3, which is not a number from 0 to 2, or one"),
        ({"text": "words", "label": -1}, "int -1, which is not a number from 0 to 2"),
        ({"text": "words", "label": "pink"}, "str 'pink', which is not .* red, green, blue"),
        ({"text": "words", "label": None}, "NoneType None"),
        ({"text": "words", "label": 0.5}, "float 0.5, which is not"),
        ({"text": "", "label": 0}, "column 'text' must hold a text"),
        ({"text": [USER], "label": 0}, "column 'text' must hold a text, got list"),
        (
            {"text": "words", "label": 0, "system": "Be kind."},
            "column 'system' belongs to the conversation and would be left out",
        ),
        ({"prompt": "words", "label": 0}, "looks for columns 'text' or 'messages', and 'label'"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, [row])


def test_what_stands_beside_a_text(tmp_path) -> None:
    """A column that repeats a part of it, one that is left out on purpose; none in a mapping."""
    row = {"text": "some words", "label": 1, "input": "words", "system": "Be kind."}
    split = load(tmp_path, [row], allow_left_out=["system"])
    assert split.samples[0].value == 1
    mapping = {"text": "text", "label": "label", "system": "system"}
    with pytest.raises(ValueError, match="nothing can stand beside a text but its label"):
        load(tmp_path, [row], format=mapping)


def test_a_margin_is_of_both_sequences(tmp_path) -> None:
    rows = [{"chosen": [USER, NINE], "rejected": [USER, EIGHT], "margin": 0.5}]
    split = load(tmp_path, rows, REWARD)
    (sample,) = split.samples
    assert len(sample.sequences) == 2 and sample.value == 0.5
    for ids, mask in sample.sequences:
        assert np.flatnonzero(mask).tolist() == [len(ids) - 1]
    row = flat_row([sample], filler=np.array([7]))
    assert row.values == (0.5, 0.5) and row.targets == [1, 1]
    assert split.unused_columns == ()
    # Under another name it has to be mapped, and nothing else reads one.
    renamed = [{"better": [USER, NINE], "worse": [USER, EIGHT], "by": "2"}]
    format = {"chosen": "better", "rejected": "worse", "margin": "by"}
    assert load(tmp_path, renamed, REWARD, format=format).samples[0].value == 2
    with pytest.raises(ValueError, match="maps other keys than it can"):
        load(tmp_path, renamed, ObjectiveConfig(name="dpo"), format=format)
    with pytest.raises(ValueError, match="column 'margin' must hold a number, got str 'far'"):
        load(tmp_path, [{**rows[0], "margin": "far"}], REWARD)


def test_what_stands_behind_the_last_token_but_padding_is_left_out(tmp_path) -> None:
    """As transformers scores the rightmost token that is not padding."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    pad = tokenizer.pad_token_id
    rows = [
        {"text": text, "label": 0} for text in ("words<|im_end|>", "<|im_end|>", "a<|im_end|>b")
    ]
    split = load(tmp_path, rows, tokenizer=tokenizer)
    kept = [sample.input_ids[:-1].tolist() for sample in split.samples]
    assert kept[0] == tokenizer("words")["input_ids"]
    # Nothing but padding: transformers takes the first token.
    assert kept[1] == [pad]
    assert kept[2] == tokenizer("a<|im_end|>b")["input_ids"]


def test_the_limit_counts_tokens_of_the_text(tmp_path) -> None:
    tokenizer = make_tokenizer()
    text = "some words that are more than a few"
    ids = tokenizer(text)["input_ids"]
    rows = [{"text": text, "label": 1}]
    whole = load(tmp_path, rows, max_length=len(ids))
    assert len(whole.samples) == 1 and whole.lengths.tolist() == [len(ids)]
    with pytest.raises(ValueError, match=f"1 longer than data.max_length={len(ids) - 1}"):
        load(tmp_path, rows, max_length=len(ids) - 1)
    # The end is kept, from which the score is read.
    cut = load(tmp_path, rows, max_length=4, too_long="truncate_left")
    assert cut.samples[0].input_ids[:-1].tolist() == ids[-4:] and cut.samples[0].value == 1
    assert cut.samples[0].num_target_tokens == 1


def test_labels_are_part_of_what_is_trained_on(tmp_path) -> None:
    def digest(*labels: int) -> str:
        rows = [{"text": f"text {at}", "label": label} for at, label in enumerate(labels)]
        return digest_of_samples(load(tmp_path, rows).samples)

    assert digest(0, 1) == digest(0, 1)
    assert len({digest(0, 1), digest(1, 0), digest(0, 0), digest(0, 2)}) == 4


def test_scoring_of_a_config() -> None:
    assert Scoring.of(ObjectiveConfig()) is None and Scoring.of(ObjectiveConfig(name="dpo")) is None
    assert Scoring.of(REWARD) == Scoring(1, pairs=True)
    assert Scoring.of(COLOURS) == Scoring(3, ("red", "green", "blue"))
