"""Which rows are asked: those whose samples the loss is of, in their order, each once."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megalora.config import DataConfig
from megalora.config.data import Source
from megalora.data.questions import read_questions
from megalora.data.splits import Split, load_data
from tests.jsonl import read_jsonl, write_jsonl


def row(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Twelve rows; the answers of rows 2 and 5 are far longer than the others."""
    rows = []
    for number in range(1, 13):
        rows.append(row(f"question {number}", "word " * (200 if number in (2, 5) else number)))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return str(tmp_path / "rows.jsonl")


def asked(data: DataConfig, split: Split | None, tokenizer: Any, limit: int | None) -> list[str]:
    assert split is not None
    return [question.asked for question in read_questions(data, split, tokenizer, limit)]


@pytest.mark.parametrize("too_long", ["left_out", "split", "truncate_right"])
def test_rows_that_the_loss_leaves_out_are_not_asked(
    too_long: Any, data: str, tokenizer: Any, tmp_path: Path
) -> None:
    """And one that was split into several samples is asked once."""
    config = DataConfig(train=data, max_length=100, too_long=too_long, cache=str(tmp_path / "c"))
    split, _ = load_data(config, tokenizer)
    left_out = (2, 5) if too_long == "left_out" else ()
    expected = [f"question {number}" for number in range(1, 13) if number not in left_out]
    assert asked(config, split, tokenizer, None) == expected
    assert asked(config, split, tokenizer, 4) == expected[:4]
    if too_long == "split":
        assert len(split.samples) > len(expected)


def test_rows_that_were_held_out(data: str, tokenizer: Any, tmp_path: Path) -> None:
    """Their text is found in the samples themselves; of a slice rows count from its start."""
    cache = str(tmp_path / "c")
    config = DataConfig(train=f"{data}[3:]", eval=4, max_length=100, cache=cache)
    train, held_out = load_data(config, tokenizer)
    assert held_out is not None
    questions = read_questions(config, held_out, tokenizer)
    rows = read_jsonl(Path(data))[3:]
    assert len(questions) == len(held_out.samples) == 4
    for question, sample in zip(questions, held_out.samples, strict=True):
        assert question.asked == rows[question.row - 1]["messages"][0]["content"]
        assert question.expected == rows[question.row - 1]["messages"][1]["content"]
        length = len(question.tokens)
        # What is asked is how the sample begins, up to its first token in the loss.
        assert question.tokens == sample.input_ids[:length].tolist()
        assert sample.loss_mask[length] and not sample.loss_mask[:length].any()
    assert not set(asked(config, train, tokenizer, None)) & {q.asked for q in questions}


def test_sources_of_their_own(data: str, tokenizer: Any, tmp_path: Path) -> None:
    """Two sources with columns of their own, and evaluation data that is a third one."""
    other = tmp_path / "other.jsonl"
    write_jsonl(other, [{"q": f"other {n}", "a": f"answer {n}"} for n in range(3)])
    third = tmp_path / "third.jsonl"
    write_jsonl(third, [row("third 1", "yes"), row("third 2", "no")])
    columns = {"prompt": "q", "completion": "a"}
    config = DataConfig(
        train=[Source(path=f"{data}[5:7]"), Source(path=str(other), format=columns)],
        eval=str(third),
        cache=str(tmp_path / "c"),
    )
    train, held_out = load_data(config, tokenizer)
    assert asked(config, train, tokenizer, None) == [
        "question 6", "question 7", "other 0", "other 1", "other 2",
    ]  # fmt: skip
    assert asked(config, held_out, tokenizer, 1) == ["third 1"]
    # A number of them is held out of both.
    config = DataConfig(train=config.train, eval=2, cache=str(tmp_path / "c"))
    train, held_out = load_data(config, tokenizer)
    both = asked(config, train, tokenizer, None) + asked(config, held_out, tokenizer, None)
    assert sorted(both) == ["other 0", "other 1", "other 2", "question 6", "question 7"]


def test_an_answer_that_is_no_text(tokenizer: Any, tmp_path: Path) -> None:
    """A row is named by its number where it cannot be asked."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [row("one", "1"), row("two", "2")])
    config = DataConfig(train=str(path), cache=str(tmp_path / "c"))
    split, _ = load_data(config, tokenizer)
    # The file changes under a run.
    write_jsonl(path, [row("one", "1"), {"messages": []}])
    with pytest.raises(ValueError, match=f"^{path}, row 2: "):
        read_questions(config, split, tokenizer)
