"""Read ShareGPT's turns (``from``, ``value``) as messages (``role``, ``content``)."""

from collections.abc import Sequence
from typing import Any

from megalora.data.messages import Message, parsed_json
from megalora.wording import typed

_CALL = "function_call"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    _CALL: "assistant",
}
"""Roles that chat templates know, by the speakers that data sets of this form name."""


def from_sharegpt(turns: Sequence[Any]) -> list[Any]:
    """Messages with role and content; items of another form stay as they are.

    A ``function_call`` turn holds a tool call, or a list of them, as JSON.

    Raises:
        ValueError: an unknown speaker, or a call that is not JSON with a name.
    """
    return [_message(turn, number) for number, turn in enumerate(turns, 1)]


def _message(turn: Any, number: int) -> Any:
    if type(turn) is not dict or turn.get("from") is None or "value" not in turn:
        return turn
    # A message with a role that happens to have a key ``from`` as well.
    if turn.get("role") is not None:
        return turn
    speaker = turn["from"]
    if speaker not in _ROLES:
        known = ", ".join(_ROLES)
        raise ValueError(f"message {number} is from {speaker!r}; known speakers are {known}")
    message: Message = {"role": _ROLES[speaker]}
    for key, item in turn.items():
        # Arrow gives turns the keys role and content, too, where other rows have them.
        if key not in ("from", "value", "role", "content"):
            message[key] = item
    value = turn.get("value")
    if speaker == _CALL:
        message["tool_calls"] = _calls(value, number)
    else:
        message["content"] = value
    return message


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls as OpenAI nests them."""
    if isinstance(value, str):
        try:
            value = parsed_json(value)
        except ValueError as error:
            raise ValueError(
                f"message {number}: a {_CALL} must hold JSON with name and arguments, got"
                f" {typed(value)} ({error})"
            ) from error
    calls = value if isinstance(value, list) else [value]
    return [{"type": "function", "function": call} for call in calls]
