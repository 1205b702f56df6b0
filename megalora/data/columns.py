"""Which column of a row holds the conversation: data.format, and what ``auto`` recognises."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

Message = dict[str, Any]
"""At least role and content; None-valued keys count as absent."""
_MAPPING_HINT = "data.format={prompt: COLUMN, completion: COLUMN} or data.format={messages: COLUMN}"


def resolve_columns(format: str | Mapping[str, str], columns: Collection[str]) -> dict[str, str]:
    """Which column holds what: ``{"messages": column}`` or ``{"prompt": column, "completion": column}``.

    Args:
        format: ``"auto"`` (a ``messages`` column, else ``prompt`` and ``completion``) or such a mapping.
        columns: names of the columns the data set has.
    Raises:
        ValueError: nothing is recognised, or the mapping has other keys or names a column that is not there.
    """
    present = ", ".join(columns)
    if isinstance(format, str):
        if format != "auto":
            raise ValueError(f"data.format={format!r} is not known; use auto, {_MAPPING_HINT}")
        for keys in (("messages",), ("prompt", "completion")):
            if all(key in columns for key in keys):
                return {key: key for key in keys}
        raise ValueError(
            f"data.format=auto looks for a column 'messages', or 'prompt' and 'completion'; there are {present}.\n"
            f"  Say which column is which: {_MAPPING_HINT}"
        )
    mapping = dict(format)
    if set(mapping) not in ({"messages"}, {"prompt", "completion"}):
        raise ValueError(f"data.format={mapping} maps other keys than it can; use {_MAPPING_HINT}")
    for key, column in mapping.items():
        if column not in columns:
            close = difflib.get_close_matches(str(column), list(columns), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"data.format: {key} is mapped to {column!r}, but the columns are {present}{hint}")
    return mapping


def to_messages(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[list[Message], int]:
    """The conversation in a row, and how many of its first messages are context only (never in the loss).

    As in TRL, prompt and completion are strings (a user and an assistant message) or lists of messages, and an
    assistant message inside the prompt is context.

    Args:
        row: one row of the data set.
        columns: what ``resolve_columns`` returned.
    Raises:
        ValueError: a column is missing from this row or holds something else, or the row defines tools.
    """
    parts: dict[str, list[Message]] = {}
    for key, column in columns.items():
        value = row.get(column)
        if isinstance(value, list):
            parts[key] = value
        elif isinstance(value, str) and key != "messages":
            parts[key] = [{"role": "user" if key == "prompt" else "assistant", "content": value}]
        else:
            expected = "a list of messages" if key == "messages" else "a string or a list of messages"
            raise ValueError(f"column {column!r} must hold {expected}, got {shown(value)}")
    if row.get("tools"):
        raise ValueError("column 'tools' is not supported: it would be left out of the prompt; remove it from the data")
    if "messages" in parts:
        return parts["messages"], 0
    return [*parts["prompt"], *parts["completion"]], len(parts["prompt"])


def shown(value: object) -> str:
    """A value in an error message: its type and the beginning of its repr."""
    return f"{type(value).__name__} {repr(value)[:60]}"
