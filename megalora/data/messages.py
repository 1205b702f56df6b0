"""Bring the messages of a row into one form, and decide which of them may be learned.

Arrow gives every object the keys of all rows, with null for those that a row lacks, and SDKs dump
empty lists. Both count as absent here, so that a template sees what was meant.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from megalora.json_text import parse_json
from megalora.wording import typed

Message = dict[str, Any]
"""At least role and content."""
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which servers and data sets keep what a model thought before it answered."""
FLAGS = ("weight", "train", "trainable", "loss", "loss_mask")
"""Keys that say whether a message is learned: OpenAI's and Mistral's, axolotl's, verl's,
ms-swift's."""
_AMBIGUOUS = ("mask", "masked")
"""Keys that mean learned in one data set and hidden from the loss in another."""
_MAX_DEPTH = 100
"""Levels of lists and objects; far below the recursion limit, 1,000 calls."""


def without_nulls(value: Any, depth: int = 0) -> Any:
    """``value`` without the keys that are None, at every depth; None in a list stays.

    Raises:
        ValueError: deeper than 100 levels, or a number that JSON does not have.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"nested deeper than {_MAX_DEPTH} levels; a chat template would not print it"
        )
    if isinstance(value, dict):
        present = {}
        for key, item in value.items():
            if item is not None:
                present[key] = without_nulls(item, depth + 1)
        return present
    if isinstance(value, list | tuple):
        return [without_nulls(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"holds the number {value}, which JSON does not have (nor a number so large)"
        )
    return value


def cleaned(message: Any, number: int, joiner: Callable[[], str]) -> tuple[Message, bool | None]:
    """A message in the form that templates expect, and whether it is learned (None: not said).

    Args:
        message: a row's message as it was read.
        number: its place in the conversation, from 1, for error messages.
        joiner: returns what stands between two text parts of one content.
    Raises:
        ValueError: it has no role or content, or holds something that cannot be used.
    """
    if type(message) is not dict:
        raise ValueError(
            f"message {number} must be an object with role and content, got {typed(message)}"
        )
    try:
        present = without_nulls(message)
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from error
    _drop_empty(present)
    _modernise_function_call(present)
    _check_role(present, message, number)
    flag = _take_flag(present, number)
    if "tool_calls" in present:
        _check_calls(present["tool_calls"], number)
        # APIs leave the content out, or null, in a message that only calls tools.
        present.setdefault("content", "")
    _check_content(present, message, number)
    present["content"] = _as_text(present["content"], number, joiner)
    _drop_equal_reasoning(present)
    return present, flag


def _drop_empty(message: Message) -> None:
    """Remove keys without a value; an empty content is one that was said."""
    for key, value in list(message.items()):
        if key not in ("role", "content") and value in ("", [], {}):
            del message[key]


def _modernise_function_call(message: Message) -> None:
    """Write OpenAI's old ``function_call`` and role ``function`` as tool calls and tool results."""
    if "function_call" in message and "tool_calls" not in message:
        call = message.pop("function_call")
        message["tool_calls"] = [{"type": "function", "function": call}]
    if message.get("role") == "function":
        message["role"] = "tool"


def _check_role(present: Message, message: Message, number: int) -> None:
    if "role" not in present:
        keys = ", ".join(message) or "none"
        raise ValueError(
            f"message {number} has no 'role' (its keys: {keys}); rename the key that says who"
            " speaks"
        )
    if present["role"] not in ROLES:
        known = ", ".join(ROLES)
        raise ValueError(
            f"message {number} has the unknown role {present['role']!r}; use one of {known}"
        )


def _check_content(present: Message, message: Message, number: int) -> None:
    if "content" in present:
        return
    if "content" in message:
        raise ValueError(
            f"message {number} ({present['role']}) has null as content; write a text, or remove it"
        )
    keys = ", ".join(message) or "none"
    raise ValueError(
        f"message {number} has no 'content' (its keys: {keys}); rename the key that holds the text"
    )


def _take_flag(message: Message, number: int) -> bool | None:
    """Remove the keys that say whether the message is learned, and return what they say."""
    for key in _AMBIGUOUS:
        if key in message:
            raise ValueError(
                f"message {number} has {key}={message[key]!r}, which can mean learned or hidden; "
                "say train: true or train: false instead"
            )
    said: dict[str, bool] = {}
    for key in FLAGS:
        if key not in message:
            continue
        value = message.pop(key)
        # True and False, 0.0 and 1.0 are equal to these.
        if value not in (0, 1):
            raise ValueError(
                f"message {number}: {key}={value!r} is neither 0 nor 1 (false nor true); "
                "weights between them are not supported"
            )
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise ValueError(f"message {number}: {' and '.join(said)} contradict each other ({said})")
    if message["role"] != "assistant" and any(said.values()):
        raise ValueError(
            f"message {number} ({message['role']}) has {next(iter(said))} set, but only assistant "
            "messages can be learned; remove it there"
        )
    return next(iter(said.values()), None)


def _as_text(content: Any, number: int, joiner: Callable[[], str]) -> str:
    """The content as one string; a list of text parts is joined as the template would join it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"message {number}: content must be a string or a list of text parts, got"
            f" {typed(content)}"
        )
    texts = [_part_text(part, number) for part in content]
    # Asking for the joiner renders the template, which most data sets do not need.
    if len(texts) <= 1:
        return "".join(texts)
    return joiner().join(texts)


def _part_text(part: Any, number: int) -> str:
    """The text of one part: a string, or {"type": "text", "text": ...}."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise ValueError(
            f"message {number}: content must be a string or a list of text parts, got a list with "
            f"{typed(part)}; only text can be trained"
        )
    rest = []
    for key, value in part.items():
        # cache_control tells a server what to cache, and is not part of the text.
        if key not in ("type", "text", "cache_control") and value:
            rest.append(key)
    if part.get("type", "text") != "text" or rest:
        what = ", ".join(rest) or f"type {part['type']!r}"
        raise ValueError(
            f"message {number}: a content part has {what}, which is not text and would be left out"
        )
    return part["text"]


def _check_calls(calls: Any, number: int) -> None:
    if not isinstance(calls, list):
        raise ValueError(f"message {number}: tool_calls must be a list, got {typed(calls)}")
    for call in calls:
        if not isinstance(call, dict) or not isinstance(function_of(call).get("name"), str):
            raise ValueError(
                f"message {number}: a tool call must be an object with a function's name and "
                f"arguments, got {typed(call)}"
            )
        # Templates print arguments as JSON, which fails where there are none.
        function_of(call).setdefault("arguments", {})


def _drop_equal_reasoning(message: Message) -> None:
    """Servers write the same reasoning under two keys; keep the first."""
    keys = [key for key in REASONING if key in message]
    for key in keys[1:]:
        if message[key] == message[keys[0]]:
            del message[key]


def function_of(call: dict[str, Any]) -> dict[str, Any]:
    """The part of a tool call that holds name and arguments.

    OpenAI nests it: {"type": "function", "function": {"name": ..., "arguments": ...}}.
    """
    inner = call.get("function")
    return inner if isinstance(inner, dict) else call


def parsed_json(text: str) -> Any:
    """The value of a JSON text; raises ``ValueError``, also where a key occurs twice."""
    return parse_json(text, exact_numbers=False)


def arguments_as_objects(messages: Sequence[Message]) -> list[Message]:
    """Tool calls whose arguments are JSON text, as OpenAI writes them, with objects instead.

    Servers parse them as well before they render a template. Text that is not a JSON object stays.
    """

    def parse(arguments: Any) -> Any:
        if not isinstance(arguments, str):
            return arguments
        try:
            # Some APIs write an empty text for a call without arguments.
            value = parsed_json(arguments or "{}")
        except ValueError:
            return arguments
        return value if isinstance(value, dict) else arguments

    return _with_arguments(messages, parse)


def arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    """Tool calls with their arguments as JSON text, for templates that concatenate them."""

    def write(arguments: Any) -> Any:
        if isinstance(arguments, str):
            return arguments
        return json.dumps(arguments, ensure_ascii=False)

    return _with_arguments(messages, write)


def _with_arguments(messages: Sequence[Message], change: Callable[[Any], Any]) -> list[Message]:
    """Copies of the messages in which ``change`` has made the arguments of every tool call."""
    changed = []
    for message in messages:
        if "tool_calls" in message:
            calls = [_with_call_arguments(call, change) for call in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
        changed.append(message)
    return changed


def _with_call_arguments(call: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    function = function_of(call)
    if "arguments" not in function:
        return call
    function = {**function, "arguments": change(function["arguments"])}
    # A call that is not nested is the function itself.
    return {**call, "function": function} if isinstance(call.get("function"), dict) else function
