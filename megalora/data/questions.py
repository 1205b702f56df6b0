"""Read questions and expected answers from rows of data: what stands before a row's last answer,
and that answer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from megalora.config import DataConfig
from megalora.config.data import Source
from megalora.data.columns import to_conversation
from megalora.data.conversation import Conversation, prepare
from megalora.data.labelled import without_label
from megalora.data.pairs import resolve, to_pair
from megalora.data.rows import open_rows
from megalora.data.samples import StoredSamples, sample_numbers
from megalora.data.splits import Split
from megalora.data.template import ChatTemplate


@dataclass(frozen=True)
class Question:
    """A row to answer."""

    row: int
    """Its number in the data, from 1; 0 where it is of no row."""
    asked: str
    """The last message before the answer, for people."""
    expected: str
    """Empty where the row's last answer is not a text, such as a call of a tool."""
    tokens: list[int]
    """The conversation up to where the answer begins."""


def read_questions(
    data: DataConfig, split: Split, tokenizer: Any, limit: int | None = None
) -> list[Question]:
    """The questions of the rows that a split's samples come from, in their order: a row that the
    loss leaves out is not asked, and one that was split into several samples is asked once.

    Args:
        split: one of the two that ``load_data`` returns for ``data``.
        limit: number of questions, the first ones; None for all.
    Raises:
        ValueError: a row cannot be read, with its number.
    """
    template = ChatTemplate(tokenizer)
    questions: list[Question] = []
    for source, rows in _rows_of(data, split, limit):
        columns: dict[str, str] | None = None
        for number, row in _read(source.path, rows):
            # Looked up in the first row, as in training: two forms in one file would be a mistake.
            if columns is None:
                columns = resolve(
                    source.format or data.format, row, pairs=split.pairs, labels=split.labels
                )
            if number not in rows:
                continue
            try:
                if split.pairs:
                    conversation, _ = to_pair(row, columns, data.allow_left_out)
                else:
                    columns = without_label(columns)
                    conversation = to_conversation(row, columns, data.allow_left_out)
                # As training prepares it.
                conversation = prepare(conversation, lambda: template.joiner)
                questions.append(_question(number, conversation, template))
            except ValueError as error:
                raise ValueError(f"{source.path}, row {number}: {error}") from error
    return questions


def asked_by_user(text: str, template: ChatTemplate) -> Question:
    """A question of no data: one message of a user."""
    conversation = Conversation(messages=[{"role": "user", "content": text}])
    return Question(0, text, "", template.prompt_tokens(conversation))


def _rows_of(
    data: DataConfig, split: Split, limit: int | None
) -> Iterator[tuple[Source, frozenset[int]]]:
    """Each source with the numbers, from 1, of the rows that the split's first samples come
    from."""
    samples = split.samples
    assert isinstance(samples, StoredSamples), "samples of a config come from stores"
    # The evaluation samples are of ``data.eval`` where that is a source of its own.
    sources = data.sources
    if isinstance(data.eval, str) and split.source == data.eval:
        sources = [Source(path=data.eval)]
    # The first piece of each sample, which stands for them all.
    places = np.unique(sample_numbers(samples), return_index=True)[1]
    chosen = samples.pieces[places[:limit]]
    # Every source has one store, in the order of the list; a store has a sample for every row.
    for number, source in enumerate(sources):
        mine = chosen["sample"][chosen["store"] == number]
        if len(mine):
            yield source, frozenset((mine + 1).tolist())


def _read(source: str, rows: frozenset[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) from the first row of a source to the last one that is wanted."""
    every = (row for chunk in open_rows(source).chunks() for row in chunk.rows())
    return islice(enumerate(every, 1), max(rows))


def _question(number: int, conversation: Conversation, template: ChatTemplate) -> Question:
    # ``prepare`` has refused conversations without an answer.
    last = conversation.assistants[-1]
    expected = conversation.messages[last]["content"]
    # A conversation may begin with the answer; then nothing was asked.
    asked = conversation.messages[last - 1]["content"] if last else ""
    before = replace(conversation, messages=conversation.messages[:last])
    answer = expected if isinstance(expected, str) else ""
    return Question(number, str(asked), answer, template.prompt_tokens(before))
