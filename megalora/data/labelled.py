"""Read an answer with a label that says whether it is good, and put prompts and answers of
different samples together.

As in TRL, the columns are ``prompt``, ``completion`` and ``label``; or a whole conversation and
``label``. The label is true for a good answer.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from megalora.data.chat import Encoded
from megalora.data.columns import mapped, resolve_columns
from megalora.wording import typed

_HINT = (
    "data.format={prompt: COLUMN, completion: COLUMN, label: COLUMN} or"
    " data.format={messages: COLUMN, label: COLUMN}"
)
_WORDS = {"true": True, "false": False, "1": True, "0": False}
"""How text files spell a label."""


def resolve_labelled(format: str | Mapping[str, str], columns: Collection[str]) -> dict[str, str]:
    """Which column holds what, as ``resolve_columns`` says it, for rows with a label.

    Raises:
        ValueError: nothing is recognised, the mapping has other keys, or it names a column that
            does not exist.
    """
    if not isinstance(format, str):
        main = ({"messages", "label"}, {"prompt", "completion", "label"})
        return mapped(format, columns, main, _HINT)
    found = resolve_columns(format, columns)
    if "label" not in columns:
        raise ValueError(
            "data.format=auto looks for a column 'label', true or false, because"
            f" objective.name=kto learns from labelled answers; there are {', '.join(columns)}.\n"
            f"  Say which column is which: {_HINT}"
        )
    return {**found, "label": "label"}


def label_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> float:
    """1 for a good answer, 0 for a bad one.

    Args:
        columns: what ``resolve_labelled`` returned.
    Raises:
        ValueError: the label is neither true nor false.
    """
    column = columns["label"]
    value = row.get(column)
    label = value
    if isinstance(value, str):
        label = _WORDS.get(value.strip().lower())
    # Tables have numbers for truth values. None is not equal to either.
    if label not in (0, 1):
        raise ValueError(f"column {column!r} must hold true or false, got {typed(value)}")
    return float(label)


def without_label(columns: Mapping[str, str]) -> dict[str, str]:
    """The mapping of what belongs to the conversation."""
    return {key: column for key, column in columns.items() if key != "label"}


def mismatched(
    samples: Sequence[Encoded], numbers: Sequence[int], max_length: int
) -> list[Encoded]:
    """Each prompt with the completion of the next sample of a global batch, in its order; the last
    one's is that of the first.

    A completion begins with the first token in the loss. The next sample is the next *other* one:
    a batch that spans two epochs may hold a sample twice. A batch of one sample, however often, has
    no such sequence.

    Args:
        samples: of the global batch.
        numbers: which sample of the data each of them is.
        max_length: most tokens of a sequence. A longer prompt loses its beginning, so that the
            completion is whole.
    """
    begins = [_completion_of(sample) for sample in samples]
    found: list[Encoded] = []
    for place, sample in enumerate(samples):
        other = _next_other(numbers, place)
        if other is None:
            continue
        answer = slice(begins[other], None)
        completion = samples[other].input_ids[answer]
        # At least the token that predicts the first of the completion; it has room, for that
        # completion has one before it in its own sample.
        kept = min(begins[place], max(1, max_length - len(completion)))
        prompt = sample.input_ids[begins[place] - kept : begins[place]]
        mask = np.concatenate([np.zeros(kept, bool), samples[other].loss_mask[answer]])
        found.append(Encoded(np.concatenate([prompt, completion]), mask))
    return found


def _completion_of(sample: Encoded) -> int:
    """Place of the first token that is learned. The first of a sequence is never, as nothing stands
    before it."""
    return 1 + int(np.argmax(sample.loss_mask[1:]))


def _next_other(numbers: Sequence[int], place: int) -> int | None:
    """The next place, in a circle, with another sample; None where there is none."""
    for step in range(1, len(numbers)):
        other = (place + step) % len(numbers)
        if numbers[other] != numbers[place]:
            return other
    return None
