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
"""Who speaks, as data sets of this form name it, and the role that chat templates know."""


def from_sharegpt(turns: Sequence[Any]) -> list[Any]:
    """Messages with role and content; what is not a turn of this form stays as it is.

    A ``function_call`` turn holds a tool call, or a list of them, as JSON.

    Raises:
        ValueError: an unknown speaker, or a call that is not JSON with a name.
    """
    return [_message(turn, number) for number, turn in enumerate(turns, 1)]


def _message(turn: Any, number: int) -> Any:
    if type(turn) is not dict or turn.get("from") is None or "value" not in turn:
        return turn
    if turn.get("role") is not None:
        return turn
    speaker = turn["from"]
    if speaker not in _ROLES:
        known = ", ".join(_ROLES)
        raise ValueError(f"message {number} is from {speaker!r}; known speakers are {known}")
    rest: Message = {k: v for k, v in turn.items() if k not in ("from", "value", "role", "content")}
    message: Message = {"role": _ROLES[speaker], **rest}
    value = turn.get("value")
    if speaker == _CALL:
        message["tool_calls"] = _calls(value, number)
    else:
        message["content"] = value
    return message


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
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
