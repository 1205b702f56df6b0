"""Read a preferred and a rejected answer to the same prompt from a row: one sample of two
sequences.

As in TRL, the columns are ``prompt``, ``chosen`` and ``rejected``, or the last two alone, each of
which then holds a whole conversation. What these two have in common at their beginning is the
prompt. Only the assistant's turns behind the prompt are in the loss; TRL has all tokens behind it,
which differs where an answer goes over several turns.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from megalora.data.chat import Encoded
from megalora.data.columns import begins_with, mapped, messages_of, to_conversation
from megalora.data.conversation import Conversation
from megalora.data.messages import Message

SIDES = ("chosen", "rejected")
_FORMS = (
    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"chosen": "chosen", "rejected": "rejected"},
)
"""Mappings that ``auto`` tries, in this order."""
_HINT = "data.format={prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}, or the last two alone"


def is_of_pairs(columns: Mapping[str, str]) -> bool:
    """Whether this mapping is one that ``resolve_pair`` has returned."""
    return "chosen" in columns


def resolve_pair(format: str | Mapping[str, str], columns: Collection[str]) -> dict[str, str]:
    """Which column holds what, as ``resolve_columns`` says it, for rows of pairs.

    Raises:
        ValueError: nothing is recognised, the mapping has other keys, or it names a column that
            does not exist.
    """
    if not isinstance(format, str):
        return mapped(format, columns, ({"chosen", "rejected"}, {"prompt", *SIDES}), _HINT)
    if format != "auto":
        raise ValueError(f"data.format={format!r} is not known; use auto, or {_HINT}")
    for form in _FORMS:
        if all(column in columns for column in form.values()):
            return dict(form)
    raise ValueError(
        "data.format=auto looks for columns 'chosen' and 'rejected', because objective.name learns"
        f" from pairs; there are {', '.join(columns)}.\n  Say which column is which: {_HINT}"
    )


def to_pair(
    row: Mapping[str, Any], columns: Mapping[str, str], allow_left_out: Collection[str] = ()
) -> tuple[Conversation, Conversation]:
    """The conversations with the chosen and with the rejected answer. All messages up to where the
    two part are context.

    Args:
        columns: what ``resolve_pair`` returned.
        allow_left_out: as in ``to_conversation``.
    Raises:
        ValueError: as ``to_conversation`` says, or an answer alone without a prompt.
    """
    chosen, rejected = (_side(row, columns, side, allow_left_out) for side in SIDES)
    # The last message of the shorter one is an answer, whatever the longer one goes on with.
    shortest = min(len(chosen.messages), len(rejected.messages)) - 1
    common = 0
    while common < shortest and chosen.messages[common] == rejected.messages[common]:
        common += 1
    # A column for the prompt says where it ends; the answers may begin alike.
    if chosen.num_context:
        common = chosen.num_context
    return replace(chosen, num_context=common), replace(rejected, num_context=common)


def _side(
    row: Mapping[str, Any], columns: Mapping[str, str], side: str, allow_left_out: Collection[str]
) -> Conversation:
    """The conversation with one of the two answers."""
    column = columns[side]
    names = {key: name for key, name in columns.items() if key not in SIDES}
    if "prompt" in names:
        prompt = messages_of(row.get(names["prompt"]), "prompt", names["prompt"])
        answer = messages_of(row.get(column), "completion", column)
        # Many data sets give the prompt by itself and once more at the head of both conversations.
        if not begins_with(_without_system(answer, prompt), prompt):
            return to_conversation(row, {**names, "completion": column}, allow_left_out)
        del names["prompt"]
    elif isinstance(row.get(column), str) and not row[column].lstrip().startswith("["):
        raise ValueError(
            f"column {column!r} holds a text and no column holds its prompt; {_HINT.split(',')[0]}"
        )
    return to_conversation(row, {**names, "messages": column}, allow_left_out)


def _without_system(answer: list[Message], prompt: list[Message]) -> list[Message]:
    """The answer without the system message that it has before the prompt."""
    # Nobody has checked these messages yet.
    roles = [one.get("role") if isinstance(one, dict) else None for one in (answer[0], prompt[0])]
    return answer[1:] if roles[0] == "system" != roles[1] else answer


def joined_pair(chosen: Encoded, rejected: Encoded) -> Encoded:
    """Both sequences as one sample. Without a token to learn in one of them, or where they are the
    same, none of the two has any."""
    ids = np.concatenate([chosen.input_ids, rejected.input_ids])
    masks = [chosen.loss_mask.copy(), rejected.loss_mask.copy()]
    for mask in masks:
        # Nothing stands before a first token to predict it.
        mask[:1] = False
    is_same = np.array_equal(chosen.input_ids, rejected.input_ids)
    if is_same or not all(mask.any() for mask in masks):
        masks = [np.zeros_like(mask) for mask in masks]
    return Encoded(
        ids,
        np.concatenate(masks),
        left_out=tuple(dict.fromkeys([*chosen.left_out, *rejected.left_out])),
        stops=chosen.stops and rejected.stops,
        num_open=chosen.num_open + rejected.num_open,
        num_unmarked=chosen.num_unmarked + rejected.num_unmarked,
        second=len(chosen.input_ids),
    )
