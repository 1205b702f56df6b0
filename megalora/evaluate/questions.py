"""Read questions and expected answers from rows of data: what stands before a row's last answer,
and that answer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from megalora.config import DataConfig
from megalora.data.columns import resolve_columns, to_conversation
from megalora.data.conversation import Conversation, prepare
from megalora.data.rows import open_rows
from megalora.data.template import ChatTemplate


@dataclass(frozen=True)
class Question:
    """A row to answer."""

    row: int
    """Its number in the data, from 1."""
    asked: str
    """The last message before the answer, for people."""
    expected: str
    tokens: list[int]
    """The conversation up to where the answer begins."""


def read_questions(
    source: str, data: DataConfig, tokenizer: Any, limit: int | None = None
) -> list[Question]:
    """The questions of a source's first ``limit`` rows.

    Raises:
        ValueError: a row cannot be read, with its number; or its last answer is not a text.
    """
    template = ChatTemplate(tokenizer)
    questions: list[Question] = []
    columns: dict[str, str] | None = None
    for number, row in enumerate(islice(_rows(source), limit), 1):
        # Looked up in the first row, as in training: two forms in one file would be a mistake.
        if columns is None:
            columns = resolve_columns(data.format, row)
        try:
            conversation = to_conversation(row, columns, data.allow_left_out)
            # As training prepares it.
            conversation = prepare(conversation, lambda: template.joiner)
            questions.append(_question(number, conversation, template))
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    return questions


def _rows(source: str) -> Iterator[dict[str, Any]]:
    for chunk in open_rows(source).chunks():
        yield from chunk.rows()


def _question(number: int, conversation: Conversation, template: ChatTemplate) -> Question:
    # ``prepare`` has refused conversations without an answer.
    last = conversation.assistants[-1]
    expected = conversation.messages[last]["content"]
    if not isinstance(expected, str) or not expected.strip():
        raise ValueError("the last answer is no text, so that no rule can compare with it")
    # A conversation may begin with the answer; then nothing was asked.
    asked = conversation.messages[last - 1]["content"] if last else ""
    before = replace(conversation, messages=conversation.messages[:last])
    return Question(number, str(asked), expected, template.prompt_tokens(before))
