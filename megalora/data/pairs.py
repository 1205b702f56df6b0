"""Read a preferred and a rejected answer to the same prompt from a row: one sample of two
sequences.

As in TRL, the columns are ``prompt``, ``chosen`` and ``rejected``, or the last two alone, each of
which then holds a whole conversation. The common beginning of these two is the prompt. Only the
assistant's turns after the prompt are in the loss; TRL has all tokens after it, which differs where
an answer spans several turns.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from megalora.data.chat import Encoded
from megalora.data.columns import (
    begins_with,
    by_form,
    messages_of,
    resolve_columns,
    to_conversation,
)
from megalora.data.conversation import Conversation
from megalora.data.labelled import resolve_labelled
from megalora.data.messages import Message, parsed_json

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


def resolve(
    format: str | Mapping[str, str],
    columns: Collection[str],
    *,
    pairs: bool,
    labels: bool = False,
) -> dict[str, str]:
    """``resolve_pair`` where rows hold pairs, ``resolve_labelled`` where they have labels, else
    ``resolve_columns``."""
    if labels:
        return resolve_labelled(format, columns)
    return resolve_pair(format, columns) if pairs else resolve_columns(format, columns)


def resolve_pair(
    format: str | Mapping[str, str], columns: Collection[str], optional: Collection[str] = ()
) -> dict[str, str]:
    """Which column holds what, as ``resolve_columns`` says it, for rows of pairs.

    Args:
        optional: further keys that a mapping may have.
    Raises:
        ValueError: nothing is recognised, the mapping has other keys, or it names a column that
            does not exist.
    """
    sought = "columns 'chosen' and 'rejected', because objective.name learns from pairs"
    return by_form(format, columns, _FORMS, sought, _HINT, optional=optional)


def to_pair(
    row: Mapping[str, Any], columns: Mapping[str, str], allow_left_out: Collection[str] = ()
) -> tuple[Conversation, Conversation]:
    """The conversations with the chosen and with the rejected answer. All messages up to where the
    two part are context.

    Args:
        columns: what ``resolve_pair`` returned.
        allow_left_out: as in ``to_conversation``.
    Raises:
        ValueError: as ``to_conversation`` says; an answer without a prompt, a prompt that would be
            said twice, or answers to different prompts.
    """
    # Both sides are read by one function, so that neither can get another prompt.
    chosen, rejected = (_side(row, columns, side, allow_left_out) for side in SIDES)
    # A column for the prompt says where it ends; the answers may begin alike.
    common = chosen.num_context or _num_common(chosen.messages, rejected.messages)
    return replace(chosen, num_context=common), replace(rejected, num_context=common)


def _num_common(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations begin with alike."""
    # The last message of the shorter one is an answer, whatever the longer one goes on with.
    shortest = min(len(chosen), len(rejected)) - 1
    common = 0
    while common < shortest and chosen[common] == rejected[common]:
        common += 1
    # ``prepare`` refuses what is no message, or no conversation at all.
    parting = [side[common] for side in (chosen, rejected) if len(side) > common]
    if any(isinstance(one, dict) and one.get("role") != "assistant" for one in parting):
        raise ValueError(
            f"chosen and rejected part at message {common + 1}, which is not an assistant's in both"
            " of them: they are answers to different prompts"
        )
    return common


def _side(
    row: Mapping[str, Any], columns: Mapping[str, str], side: str, allow_left_out: Collection[str]
) -> Conversation:
    """The conversation with one of the two answers."""
    column = columns[side]
    answer = _parsed(row.get(column))
    row = {**row, column: answer}
    names = {key: name for key, name in columns.items() if key not in SIDES}
    # An empty prompt is none: the conversations have it.
    if "prompt" in names and row.get(names["prompt"]) in (None, "", []):
        del names["prompt"]
    if "prompt" not in names:
        if isinstance(answer, str):
            raise ValueError(
                f"column {column!r} holds a text and no column holds its prompt; use {_HINT}, or"
                " write the conversation as messages"
            )
        return to_conversation(row, {**names, "messages": column}, allow_left_out)
    prompt = messages_of(row[names["prompt"]], "prompt", names["prompt"])
    messages = messages_of(answer, "completion", column)
    if not _is_whole(messages):
        return to_conversation(row, {**names, "completion": column}, allow_left_out)
    # Many data sets give the prompt by itself and once more at the head of both conversations.
    if not begins_with(_without_system(messages, prompt), prompt):
        raise ValueError(
            f"column {column!r} holds a whole conversation that does not begin with"
            f" {names['prompt']!r}, which would be said beside it; leave that out:"
            f" data.format={{chosen: {columns['chosen']}, rejected: {columns['rejected']}}}"
        )
    if row.get(names.get("input", "input")) and "input" in names:
        raise ValueError(
            f"column {names['input']!r} belongs to the prompt, which column {column!r} repeats"
            " without it; leave it out of data.format"
        )
    names.pop("prompt")
    names.pop("input", None)
    return to_conversation(row, {**names, "messages": column}, allow_left_out)


def _parsed(value: Any) -> Any:
    """Messages that are written as JSON text; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = parsed_json(value)
    except ValueError:
        # An answer may begin with a bracket.
        return value
    is_messages = isinstance(found, list) and all(_has_speaker(one) for one in found)
    return found if found and is_messages else value


def _has_speaker(message: Any) -> bool:
    return isinstance(message, dict) and bool(message.keys() & {"role", "from"})


def _is_whole(messages: list[Message]) -> bool:
    """Whether these are a conversation, and not the answer alone."""
    # Nobody has checked these messages yet.
    first = messages[0] if messages else None
    return isinstance(first, dict) and first.get("role") in ("system", "developer", "user")


def _without_system(messages: list[Message], prompt: list[Message]) -> list[Message]:
    """The conversation without the system message that it has before the prompt."""
    if messages[0].get("role") == "system" and prompt[0].get("role") != "system":
        return messages[1:]
    return messages


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
        for mask in masks:
            mask[:] = False
    return Encoded(
        ids,
        np.concatenate(masks),
        left_out=tuple(dict.fromkeys([*chosen.left_out, *rejected.left_out])),
        stops=chosen.stops and rejected.stops,
        num_open=chosen.num_open + rejected.num_open,
        num_unmarked=chosen.num_unmarked + rejected.num_unmarked,
        second=len(chosen.input_ids),
    )
