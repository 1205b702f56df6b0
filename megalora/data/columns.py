"""Find the conversation in a row: ``data.format``, what ``auto`` recognises, and further columns.

A column that belongs to the conversation is used, or refused by name. Others (ids, sources, scores)
are named once per data set as not used.
"""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args

from megalora.config import LeftOut, LeftOutOfText
from megalora.data.conversation import Conversation, objects
from megalora.data.messages import Message, parsed_json, without_nulls
from megalora.data.sharegpt import from_sharegpt
from megalora.wording import typed

_FORMS: tuple[dict[str, str], ...] = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"messages": "conversation"},
    {"prompt": "prompt", "completion": "completion"},
    {"prompt": "instruction", "completion": "output"},
)
"""Mappings that ``auto`` tries, in this order."""
_BESIDE = ("system", "tools", "functions", "documents", "chat_template_kwargs")
"""Columns that are used under their own name wherever they exist."""
_KEYS = ("messages", "prompt", "completion", "input", *_BESIDE)
KINDS: tuple[str, ...] = get_args(LeftOutOfText)
"""Entries of ``data.allow_left_out`` that name what a template may leave out; others are columns.
"""
CONVERSATION_COLUMNS = tuple(name for name in get_args(LeftOut) if name != "name")
"""Columns that must be used, because they hold a part of the conversation."""
_MAPPING_HINT = "data.format={prompt: COLUMN, completion: COLUMN} or data.format={messages: COLUMN}"


def resolve_columns(format: str | Mapping[str, str], columns: Collection[str]) -> dict[str, str]:
    """Which column holds what: ``messages``, or ``prompt`` and ``completion``, and others.

    Args:
        format: ``"auto"`` or a mapping from messages, prompt, completion, input, system, tools,
            functions, documents, chat_template_kwargs to columns.
        columns: names of the columns the data set has.
    Raises:
        ValueError: nothing is recognised, the mapping has other keys, or it names a column that
            does not exist.
    """
    # This hint is a list with an "or" of its own.
    if isinstance(format, str) and format != "auto":
        raise ValueError(f"data.format={format!r} is not known; use auto, {_MAPPING_HINT}")
    also = ""
    if "chosen" in columns and "rejected" in columns:
        also = ", or learn from both answers with objective.name=dpo"
    sought = (
        "a column 'messages' or 'conversations', or 'prompt' and 'completion', or 'instruction' and"
        " 'output'"
    )
    return by_form(format, columns, _FORMS, sought, _MAPPING_HINT, also)


def by_form(
    format: str | Mapping[str, str],
    columns: Collection[str],
    forms: Sequence[Mapping[str, str]],
    sought: str,
    hint: str,
    also: str = "",
    optional: Collection[str] = (),
) -> dict[str, str]:
    """The first of ``forms`` whose columns exist, or a mapping of the user's with the keys of one.

    Args:
        sought: what ``auto`` looks for, for its message.
        hint: the mappings that there are, for messages.
        also: what else the user may do, for its message.
        optional: further keys that a mapping may have.
    Raises:
        ValueError: as ``resolve_columns`` says.
    """
    if not isinstance(format, str):
        return mapped(format, columns, [set(form) for form in forms], hint, optional)
    if format != "auto":
        raise ValueError(f"data.format={format!r} is not known; use auto, or {hint}")
    for form in forms:
        if all(column in columns for column in form.values()):
            return dict(form)
    raise ValueError(
        # Names of a file may be of any length.
        f"data.format=auto looks for {sought}; there are {', '.join(columns)[:400]}.\n"
        f"  Say which column is which: {hint}{also}"
    )


def mapped(
    format: Mapping[str, str],
    columns: Collection[str],
    allowed: Collection[Collection[str]],
    hint: str,
    optional: Collection[str] = (),
) -> dict[str, str]:
    """A mapping of the user's, as a plain dict.

    Args:
        allowed: sets of main keys, of which the mapping must have one.
        hint: the mappings that there are, for messages.
        optional: keys that may stand beside any of these sets.
    Raises:
        ValueError: the mapping has other keys, or it names a column that does not exist.
    """
    mapping = dict(format)
    main = mapping.keys() - {"input", *_BESIDE, *optional}
    # Alpaca's input is appended to the prompt, which whole conversations do not have.
    with_input = "input" in mapping and "prompt" not in mapping
    if main not in allowed or with_input:
        raise ValueError(
            f"data.format={mapping} maps other keys than it can; use {hint}, and beside "
            f"them {', '.join(_BESIDE)} (and input, with prompt)"
        )
    present = ", ".join(columns)
    # A column may be missing from a single row, but not from the first one, whose these are.
    for key, column in mapping.items():
        if column not in columns:
            close = difflib.get_close_matches(str(column), list(columns), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"data.format: {key} is mapped to {column!r}, but the columns are {present}{hint}"
            )
    return mapping


def used_columns(columns: Mapping[str, str]) -> set[str]:
    """Names of the columns that ``to_conversation`` reads."""
    return set(_with_defaults(columns).values())


def _with_defaults(columns: Mapping[str, str]) -> dict[str, str]:
    """The mapping with the further columns under their own names."""
    names = dict(columns)
    # Alpaca has instruction, input and output.
    if names.get("prompt") == "instruction":
        names.setdefault("input", "input")
    for key in _BESIDE:
        names.setdefault(key, key)
    return names


def to_conversation(
    row: Mapping[str, Any], columns: Mapping[str, str], allow_left_out: Collection[str] = ()
) -> Conversation:
    """The conversation in a row.

    As in TRL, prompt and completion are strings (a user and an assistant message) or lists of
    messages, and an assistant message inside the prompt is context.

    Args:
        row: one row of the data set.
        columns: what ``resolve_columns`` returned.
        allow_left_out: columns that belong to the conversation and are to be left out all the same.
    Raises:
        ValueError: a column is missing from this row or holds something else, or a column that
            belongs to the conversation is not used.
    """
    names = _with_defaults(columns)

    def held(key: str) -> Any:
        """The row's value for a key of the mapping; None if it has none or may be left out."""
        column = names.get(key)
        if column is None:
            return None
        # "tools" and "documents" are columns and kinds: the template gets them and may leave them
        # out. A column that the user has mapped is used in any case.
        ignored = column in allow_left_out and column not in KINDS and key not in columns
        return None if ignored else row.get(column)

    messages, num_context = _main_messages(held, names)
    system = held("system")
    if system:
        with_system = _with_system(messages, system, names["system"])
        # Where a prompt is context, a system message before it is context, too.
        if num_context:
            num_context += len(with_system) - len(messages)
        messages = with_system
    refuse_unused(row, set(names.values()), allow_left_out, messages)
    options = _json(held("chat_template_kwargs"), names["chat_template_kwargs"]) or {}
    if not isinstance(options, dict):
        raise ValueError(
            f"column {names['chat_template_kwargs']!r} must hold an object, got {typed(options)}"
        )
    return Conversation(
        messages=messages,
        num_context=num_context,
        tools=_tools(held("tools"), held("functions"), names),
        documents=objects(_json(held("documents"), names["documents"]), names["documents"]),
        options=without_nulls(options),
    )


def _main_messages(
    held: Callable[[str], Any], names: Mapping[str, str]
) -> tuple[list[Message], int]:
    """The messages of a row without a system column's, and how many of them are context.

    Args:
        held: returns the row's value for a key of the mapping.
        names: the mapping from keys to columns.
    """
    if "messages" in names:
        return messages_of(held("messages"), "messages", names["messages"]), 0
    prompt = messages_of(held("prompt"), "prompt", names["prompt"])
    prompt = _with_input(prompt, held("input"), names)
    # Prompts whose completions are sampled need none.
    if "completion" not in names:
        return prompt, len(prompt)
    completion = messages_of(held("completion"), "completion", names["completion"])
    _refuse_repeated_prompt(prompt, completion, names)
    return [*prompt, *completion], len(prompt)


def refuse_unused(
    row: Mapping[str, Any], used: set[str], allowed: Collection[str], messages: list[Message]
) -> None:
    """Raise ``ValueError`` for a column of the conversation that is neither used nor repeated.

    Args:
        used: columns that are read.
        allowed: ``data.allow_left_out``.
        messages: what the row is read as.
    """
    for column in CONVERSATION_COLUMNS:
        value = row.get(column)
        if column in used or column in allowed or value in (None, "", [], {}):
            continue
        # Data sets often keep the columns that their messages were made of.
        if isinstance(value, str) and _stands_in(value.strip(), messages):
            continue
        keys = ", ".join(_KEYS)
        raise ValueError(
            f"column {column!r} belongs to the conversation and would be left out "
            f"({typed(value)}).\n  Map it in data.format where that has a key for it ({keys}), or "
            f"leave it out on purpose: data.allow_left_out=[{column}]"
        )


def _stands_in(text: str, messages: list[Message]) -> bool:
    """Whether the content of a message holds the text."""
    for message in messages:
        # Messages are not checked yet, so that anything may stand here.
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str) and text in content:
            return True
    return False


def _json(value: Any, column: str) -> Any:
    """A value that may be written as JSON text, because columns of objects need one type."""
    if not isinstance(value, str):
        return value
    # CSV and Parquet columns of text have empty texts where a row has nothing.
    if not value.strip():
        return None
    try:
        return parsed_json(value)
    except ValueError as error:
        raise ValueError(f"column {column!r} holds text that is not JSON ({error})") from error


def messages_of(value: Any, key: str, column: str) -> list[Message]:
    """The messages of a column: a list, or for ``prompt`` and ``completion`` also a text. Nobody
    has checked them yet.

    Raises:
        ValueError: it holds something else.
    """
    if key == "messages" and isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, column)
    if isinstance(value, list):
        return from_sharegpt(value)
    if isinstance(value, str) and key != "messages":
        role = "user" if key == "prompt" else "assistant"
        return [{"role": role, "content": value}]
    expected = "a list of messages" if key == "messages" else "a string or a list of messages"
    raise ValueError(f"column {column!r} must hold {expected}, got {typed(value)}")


def _refuse_repeated_prompt(
    prompt: list[Message], completion: list[Message], names: Mapping[str, str]
) -> None:
    """Raise ``ValueError`` for a completion that begins with the prompt.

    Preference data sets have such columns, often called ``chosen``.
    """
    if begins_with(completion, prompt):
        column = names["completion"]
        raise ValueError(
            f"column {column!r} begins with the messages of {names['prompt']!r}, which would be"
            f" said twice; use data.format={{messages: {column}}}"
        )


def begins_with(completion: list[Message], prompt: list[Message]) -> bool:
    """Whether a completion says the prompt once more and goes on behind it."""
    begin = completion[: len(prompt)]
    is_longer = len(completion) > len(prompt) > 0
    return is_longer and all(map(_say_the_same, begin, prompt))


def _say_the_same(one: Any, other: Any) -> bool:
    """Whether two messages, which nobody has checked yet, have the same role and content."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(one.get(key) == other.get(key) for key in ("role", "content"))
    return one == other


def _with_input(prompt: list[Message], text: Any, names: Mapping[str, str]) -> list[Message]:
    """The prompt with Alpaca's input in a line of its own below the instruction."""
    if text in (None, ""):
        return prompt
    plain = len(prompt) == 1 and isinstance(prompt[0].get("content"), str)
    if not isinstance(text, str) or not plain:
        raise ValueError(
            f"column {names['input']!r} must hold a string, beside a string in {names['prompt']!r},"
            f" got {typed(text)}"
        )
    return [{**prompt[0], "content": f"{prompt[0]['content']}\n{text}"}]


def _with_system(messages: list[Message], text: Any, column: str) -> list[Message]:
    """The system prompt of a column as the first message, unless it stands there already."""
    if not isinstance(text, str):
        raise ValueError(f"column {column!r} must hold a string, got {typed(text)}")
    # Messages are not checked yet, so that anything may stand there.
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": text}, *messages]
    if first.get("content") != text:
        raise ValueError(
            f"column {column!r} and the first message hold different system prompts; keep one"
        )
    return messages


def _tools(tools: Any, functions: Any, names: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """Tools for the template, from the column for them or the one for OpenAI's old functions."""
    found = objects(_json(tools, names["tools"]), names["tools"])
    old = objects(_json(functions, names["functions"]), names["functions"])
    if found and old:
        raise ValueError(f"columns {names['tools']!r} and {names['functions']!r} are both set")
    if old:
        # The old form of a function lacks the wrapping that a tool has.
        return [{"type": "function", "function": function} for function in old]
    return found
