"""Rows with a label: what ``auto`` recognises, what is refused, and which sequences a prompt and
the answer to another one make."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megalora.config import DataConfig, ObjectiveConfig
from megalora.data.chat import Encoded, encode
from megalora.data.digest import samples_digest
from megalora.data.labelled import label_of, mismatched, resolve_labelled
from megalora.data.questions import read_questions
from megalora.data.samples import digest_of_samples
from megalora.data.splits import load_data
from megalora.data.tokenizer import load_tokenizer
from tests.jsonl import write_jsonl

KTO = ObjectiveConfig(name="kto")
ASKED = {"role": "user", "content": "How many?"}
ANSWERS = ("three", "four and a half", "none at all")


def samples_of(path: Path, rows: list[dict[str, Any]], tokenizer: Any, **data: Any) -> Any:
    write_jsonl(path / "rated.jsonl", rows)
    config = DataConfig(train=str(path / "rated.jsonl"), max_length=99, **data)
    return load_data(config, tokenizer, objective=KTO)


@pytest.mark.parametrize("form", ["text", "messages", "conversation", "mapped"])
def test_every_form_is_the_same_sample(form: str, tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    rows = []
    for i, answer in enumerate(ANSWERS):
        said = {"role": "assistant", "content": answer}
        row: dict[str, Any] = {"label": i != 1}
        if form == "text":
            row |= {"prompt": ASKED["content"], "completion": answer}
        elif form == "messages":
            row |= {"prompt": [ASKED], "completion": [said]}
        elif form == "conversation":
            row |= {"messages": [ASKED, said]}
        else:
            row = {"q": ASKED["content"], "a": answer, "ok": str(i != 1)}
        rows.append(row)
    how: Any = {"prompt": "q", "completion": "a", "label": "ok"} if form == "mapped" else "auto"
    split, _ = samples_of(tmp_path, rows, tokenizer, format=how)
    assert split.labels and not split.unused_columns
    assert [sample.value for sample in split.samples] == [1, 0, 1]
    for sample, answer in zip(split.samples, ANSWERS, strict=True):
        expected = encode([ASKED, {"role": "assistant", "content": answer}], tokenizer)
        assert sample.input_ids.tolist() == expected.input_ids.tolist()
        assert sample.loss_mask.tolist() == expected.loss_mask.tolist()


def test_questions_are_asked_without_the_label(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "completion": text, "label": False} for text in ANSWERS]
    split, _ = samples_of(tmp_path, rows, load_tokenizer(tiny))
    data = DataConfig(train=str(tmp_path / "rated.jsonl"))
    found = read_questions(data, split, AutoTokenizer.from_pretrained(tiny))
    assert [(question.asked, question.expected) for question in found] == [
        ("Why?", text) for text in ANSWERS
    ]


def test_other_labels_are_other_samples(tiny: Path, tmp_path: Path) -> None:
    """A run must not go on with answers that were good before."""
    tokenizer = load_tokenizer(tiny)
    digests = set()
    for bad in range(3):
        rows = []
        for i, text in enumerate(ANSWERS):
            rows.append({"prompt": "Why?", "completion": text, "label": i != bad})
        split, _ = samples_of(tmp_path, rows, tokenizer)
        digests.add(digest_of_samples(split.samples))
        # The same of samples in memory, where earlier checkpoints have a digest of tokens.
        assert digest_of_samples(list(split.samples)) == digest_of_samples(split.samples)
    assert len(digests) == 3
    assert samples_digest(split.samples)


def test_labelled_samples_are_stored_apart(tiny: Path, tmp_path: Path) -> None:
    """The same rows may have been read without their labels before."""
    rows = [{"prompt": "Why?", "completion": text, "label": True} for text in ANSWERS]
    write_jsonl(tmp_path / "rated.jsonl", rows)
    config = DataConfig(train=str(tmp_path / "rated.jsonl"), max_length=99)
    tokenizer = load_tokenizer(tiny)
    for objective, value in ((ObjectiveConfig(), 0), (KTO, 1), (ObjectiveConfig(), 0)):
        split, _ = load_data(config, tokenizer, objective=objective)
        assert [sample.value for sample in split.samples] == [value] * 3


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, 1), (False, 0), (1, 1), (0.0, 0), ("True", 1), (" false", 0), ("1", 1), ("0", 0)],
)
def test_labels(value: Any, label: float) -> None:
    assert label_of({"ok": value}, {"label": "ok"}) == label


@pytest.mark.parametrize("value", [None, 2, -1, 0.5, "good", "", [True], float("nan")])
def test_what_is_no_label_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="column 'ok' must hold true or false, got "):
        label_of({"ok": value}, {"label": "ok"})


def test_columns_that_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looks for a column 'label', .* there are prompt, comp"):
        resolve_labelled("auto", ["prompt", "completion"])
    with pytest.raises(ValueError, match="maps other keys than it can"):
        resolve_labelled({"prompt": "a", "completion": "b"}, ["a", "b"])
    with pytest.raises(ValueError, match="label is mapped to 'ok', but the columns are a"):
        resolve_labelled({"messages": "a", "label": "ok"}, ["a"])
    row = {"prompt": "Why?", "completion": "so", "label": True}
    with pytest.raises(ValueError, match="has one sample, and objective.name=kto compares each"):
        samples_of(tmp_path, [row], load_tokenizer(tiny))
    with pytest.raises(ValueError, match=r"has one sample, and .*, also for data.eval"):
        samples_of(tmp_path, [row, row | {"completion": "no"}, row], load_tokenizer(tiny), eval=0.1)


def sample(prompt: int, answer: int, first: int) -> Encoded:
    """So many tokens, counted from ``first``; a user's turn stands within the answer."""
    mask = np.arange(prompt + answer) >= prompt
    mask[prompt + 1 : prompt + 2] = False
    return Encoded(np.arange(first, first + prompt + answer, dtype=np.int32), mask)


def test_prompts_go_with_the_next_answer() -> None:
    samples = [sample(3, 4, 100), sample(1, 2, 200), sample(5, 3, 300)]
    found = mismatched(samples, [7, 8, 9], 99)
    assert [one.input_ids.tolist() for one in found] == [
        [100, 101, 102, 201, 202],
        [200, 305, 306, 307],
        [300, 301, 302, 303, 304, 103, 104, 105, 106],
    ]
    for one, other in zip(found, (1, 2, 0), strict=True):
        answer = samples[other].loss_mask[samples[other].loss_mask.argmax() :]
        assert one.loss_mask[-len(answer) :].tolist() == answer.tolist()
        assert not one.loss_mask[: -len(answer)].any()
    # As many tokens in all as the samples have.
    assert sum(len(one.input_ids) for one in found) == sum(len(one.input_ids) for one in samples)


def test_a_sample_s_own_answer_is_never_taken() -> None:
    """Batches at the border of two epochs, or of more samples than there are."""
    twice = sample(2, 3, 100)
    other = sample(2, 3, 200)
    found = mismatched([twice, twice, other], [4, 4, 5], 99)
    assert [one.input_ids[[0, -1]].tolist() for one in found] == [
        [100, 204],
        [100, 204],
        [200, 104],
    ]
    assert mismatched([twice, twice], [4, 4], 99) == []


def test_a_long_prompt_loses_its_beginning() -> None:
    """The answer stays whole, with the token that predicts its first one."""
    samples = [sample(6, 1, 100), sample(1, 6, 200)]
    first, second = mismatched(samples, [0, 1], 7)
    assert first.input_ids.tolist() == [105, 201, 202, 203, 204, 205, 206]
    assert second.input_ids.tolist() == [200, 106]
    # A sample that was cut at its left may begin with a learned token, which nothing predicts.
    cut = Encoded(np.arange(4, dtype=np.int32), np.array([True, True, True, True]))
    found = mismatched([cut, samples[1]], [0, 1], 99)
    assert found[0].input_ids.tolist() == [0, 201, 202, 203, 204, 205, 206]
    assert found[1].input_ids.tolist() == [200, 1, 2, 3]
