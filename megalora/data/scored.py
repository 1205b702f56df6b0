"""Read rows for a score head: a text or a conversation with its label, or a pair of answers to
compare.

A scored sequence ends in a place of its own behind its last token. The place is the only one in
the loss, and the token that stands there means nothing: the head reads a score where a language
model would predict it. So order, packing, cutting and context parallelism treat scored sequences
as any other.

The score is read from the last token that is not the padding token, as transformers does
(``...ForSequenceClassification``). What stands behind that token cannot change its score, and is
left out.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megalora.config import ObjectiveConfig
from megalora.data.chat import Encoded, encode_text
from megalora.data.columns import by_form, refuse_unused, to_conversation
from megalora.data.labelled import without_label
from megalora.data.pairs import joined_pair, resolve_pair, to_pair
from megalora.data.template import ChatTemplate
from megalora.wording import first_few, typed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = (
    {"text": "text", "label": "label"},
    {"messages": "messages", "label": "label"},
    {"messages": "conversations", "label": "label"},
)
"""Mappings that ``auto`` tries, in this order."""
_HINT = "data.format={text: COLUMN, label: COLUMN} or data.format={messages: COLUMN, label: COLUMN}"


@dataclass(frozen=True)
class Scoring:
    """What a score head is to learn from a row."""

    num_labels: int
    names: tuple[str, ...] = ()
    """Of the labels, in the order of their numbers; none where they have only numbers."""
    pairs: bool = False

    @classmethod
    def of(cls, objective: ObjectiveConfig) -> "Scoring | None":
        """What a config's objective says; None for a language model's."""
        if not objective.num_scores:
            return None
        return cls(objective.num_scores, tuple(objective.labels or ()), objective.pairs)

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {**asdict(self), "names": list(self.names)}


def resolve_scored(
    format: str | Mapping[str, str], columns: Collection[str], scoring: Scoring
) -> dict[str, str]:
    """Which column holds what, as ``resolve_columns`` says it.

    Raises:
        ValueError: nothing is recognised, the mapping has other keys, or it names a column that
            does not exist.
    """
    if scoring.pairs:
        found = resolve_pair(format, columns, optional=("margin",))
        # As in TRL, a column of this name is used wherever it exists.
        if isinstance(format, str) and "margin" in columns:
            found["margin"] = "margin"
        return found
    sought = (
        "columns 'text' or 'messages', and 'label', because objective.name=classify learns labels"
    )
    found = by_form(format, columns, _FORMS, sought, _HINT)
    # A text is read alone: what a mapping puts beside it would be left out.
    if "text" in found and found.keys() != {"text", "label"}:
        raise ValueError(
            f"data.format={found}: nothing can stand beside a text but its label; map messages"
            " where a row is a conversation"
        )
    return found


def scored_sample(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    template: ChatTemplate,
    allow_left_out: Collection[str],
    scoring: Scoring,
) -> Encoded:
    """A row as one sample: a sequence, or the two of a pair.

    Args:
        columns: what ``resolve_scored`` returned.
    Raises:
        ValueError: a label that is none, a margin that is no number, or as ``encode_text`` says.
    """
    # As the card of an adapter has transformers take it from the tokenizer.
    pad: Any = template.tokenizer.pad_token_id
    if scoring.pairs:
        # Without the column every pair counts alike.
        margin = 0.0
        if "margin" in columns:
            margin = _number(row.get(columns["margin"]), columns["margin"])
        sides: list[Encoded] = []
        for conversation in to_pair(row, columns, allow_left_out):
            encoded = encode_text(conversation, template, allow_left_out)
            sides.append(_with_place(encoded, pad))
        return replace(joined_pair(*sides), value=margin)
    label = _label(row.get(columns["label"]), columns["label"], scoring)
    if "text" in columns:
        text = row.get(columns["text"])
        encoded = _plain(text, columns["text"], template.tokenizer)
        read = [{"role": "user", "content": text}]
        refuse_unused(row, set(columns.values()), allow_left_out, read)
    else:
        # All else of the row is read as for a language model.
        conversation = to_conversation(row, without_label(columns), allow_left_out)
        encoded = encode_text(conversation, template, allow_left_out)
    return replace(_with_place(encoded, pad), value=label)


def _plain(text: Any, column: str, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """A text alone, with the special tokens that the tokenizer adds to one."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"column {column!r} must hold a text, got {typed(text)}")
    ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)
    return Encoded(ids, np.zeros(len(ids), dtype=bool))


def _with_place(encoded: Encoded, pad: int | None) -> Encoded:
    """The sequence up to the token that is scored, and the place behind it."""
    ids = encoded.input_ids
    kept = np.flatnonzero(ids != pad)
    # As transformers' argmax of nothing: the first token of a sequence of padding.
    last = int(kept[-1]) if len(kept) else 0
    # Any token will do there: no position reads it.
    ids = np.append(ids[: last + 1], np.int32(0))
    mask = np.zeros(len(ids), dtype=bool)
    mask[-1] = True
    return Encoded(ids, mask, encoded.left_out)


def _label(value: Any, column: str, scoring: Scoring) -> float:
    """The number of a label; where there is one label, its value."""
    # What transformers takes for regression.
    if scoring.num_labels == 1:
        return _number(value, column)
    # A name comes before a number, in JSON as in files of text: labels may be called "1" and "0".
    names = {name: place for place, name in enumerate(scoring.names)}
    if isinstance(value, bool):
        names = {name.lower(): place for name, place in names.items()}
    if (spelled := _spelled(value)) in names:
        return float(names[spelled])
    # Of text files everything is a text; a truth value is 0 or 1.
    number = value
    if isinstance(value, str) and value.strip().isdecimal():
        number = int(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, int) and 0 <= number < scoring.num_labels:
        return float(number)
    # transformers would fail on the device, or in silence leave out -100.
    known = f"a number from 0 to {scoring.num_labels - 1}"
    if scoring.names:
        known += f", or one of {first_few(list(scoring.names), 10)}"
    raise ValueError(
        f"column {column!r} holds the label {typed(value)}, which is not {known}; see"
        " objective.labels and objective.num_labels"
    )


def _spelled(value: Any) -> str:
    """A label as a file of text has it."""
    if isinstance(value, bool):
        return str(value).lower()
    # Columns of numbers come as floats where a value is missing.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _number(value: Any, column: str) -> float:
    """A finite number, which may be written as text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        # The last one for an integer that no float holds.
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"column {column!r} must hold a number, got {typed(value)}")
    return number
