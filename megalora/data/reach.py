"""Check that everything a conversation holds reaches the text that a chat template makes of it."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megalora.data.conversation import Conversation
from megalora.data.marks import Alphabet, Piece, Rendered, mark, same_text, unused_alphabet
from megalora.data.messages import function_of
from megalora.data.template import ChatTemplate, RefusedByTemplate

_FIRST_NUMBER = 123_456_000_000
"""Stand-ins for numbers count up from here: long enough not to occur by chance."""
_PLAIN_KEYS = ("role", "content", "tool_calls", "index")
"""Keys of a message that are checked otherwise, or say only what the order says."""
_MAX_EXCERPT = 60
"""Characters of a value in an error message."""


@dataclass(frozen=True)
class Marked:
    """Where the pieces of a conversation stand in its text."""

    conversation: Conversation
    """The conversation with its marks; without any where the template does not bear them."""
    alphabet: Alphabet
    """Characters of the marks."""
    pieces: list[Piece]
    """All pieces, marked or not; their places here are their numbers."""
    rendered: Rendered
    """The text, and the pieces that were found in it."""
    sought: frozenset[int]
    """Numbers of the marked pieces: one of these without a span is not in the text."""


def locate(conversation: Conversation, template: ChatTemplate, text: str) -> Marked:
    """Mark as much of the conversation as the template bears without printing another text.

    First every piece; where a template looks into what it prints, the messages only, then the
    assistant's only, then one message after the other.
    """
    alphabet = unused_alphabet(text)
    # Without marks, to number the pieces.
    _, pieces = mark(conversation, alphabet, ())
    everything = frozenset(range(len(pieces)))
    assistants = set(conversation.assistants)
    owned: set[int] = set()
    # Numbers of the pieces of each of the assistant's messages.
    generated: dict[int, set[int]] = {i: set() for i in assistants}
    for number, piece in enumerate(pieces):
        # Tools and documents belong to no message.
        if piece.owner is None:
            continue
        owned.add(number)
        if piece.owner in assistants:
            generated[piece.owner].add(number)
    all_generated = frozenset().union(*generated.values())
    # Equal sets are tried once: every try renders the template.
    for chosen in dict.fromkeys((everything, frozenset(owned), all_generated)):
        marked, _ = mark(conversation, alphabet, chosen)
        rendered = _rendered(marked, template, alphabet)
        if rendered is not None and rendered.text == text:
            return Marked(marked, alphabet, pieces, rendered, chosen)
    # The conversation stays unmarked here: no marked one shows all that was found.
    spans = {}
    sought: set[int] = set()
    for chosen in generated.values():
        marked, _ = mark(conversation, alphabet, chosen)
        rendered = _rendered(marked, template, alphabet)
        if rendered is not None and rendered.text == text:
            spans.update(rendered.spans)
            sought |= chosen
    return Marked(conversation, alphabet, pieces, Rendered(text, spans), frozenset(sought))


def _rendered(marked: Conversation, template: ChatTemplate, alphabet: Alphabet) -> Rendered | None:
    """The text and where the marks were; None where the template refuses what is marked."""
    try:
        return alphabet.parse(template.render(marked))
    except RefusedByTemplate:
        return None


def left_out(conversation: Conversation, template: ChatTemplate, marked: Marked) -> Iterator[Piece]:
    """Pieces that do not reach the text whole, in the order of the conversation."""
    text = marked.rendered.text
    for number, piece in enumerate(marked.pieces):
        if number in marked.sought:
            if not _is_whole(piece, number, marked.rendered):
                yield piece
        # A piece that could not be marked with the others needs a rendering of its own.
        elif not _reaches(conversation, template, marked, number):
            yield piece
    # Templates look parameters up by their names, so that no mark can stand around these.
    for name in _parameters(conversation.tools):
        if name not in text:
            yield Piece(None, "tools", name)
    yield from _numbers_left_out(conversation, template, text)
    yield from _flags_left_out(conversation, template, text)


def _is_whole(piece: Piece, number: int, rendered: Rendered) -> bool:
    """Whether a piece stands in the text whole, at one of the places where its marks are."""
    spans = rendered.spans.get(number, ())
    return any(same_text(rendered.text[start:end], piece.text) for start, end in spans)


def _reaches(
    conversation: Conversation, template: ChatTemplate, marked: Marked, number: int
) -> bool:
    """Whether one piece reaches the text, by marking it alone."""
    text = marked.rendered.text
    piece = marked.pieces[number]
    alone = mark(conversation, marked.alphabet, {number})[0]
    rendered = _rendered(alone, template, marked.alphabet)
    if rendered is not None and rendered.text == text:
        return _is_whole(piece, number, rendered)
    # The template decides by this text, so that it cannot be changed: it must stand there, as it is
    # or as JSON writes it, without the quotes.
    return piece.text in text or json.dumps(piece.text, ensure_ascii=False)[1:-1] in text


def _parameters(tree: Any) -> Iterator[str]:
    """Names of the parameters in a JSON schema."""
    if isinstance(tree, list):
        for item in tree:
            yield from _parameters(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            # {"properties": {"city": {"type": "string"}}}: the keys are the names.
            if key == "properties" and isinstance(value, dict):
                yield from value
            yield from _parameters(value)


def _numbers_left_out(
    conversation: Conversation, template: ChatTemplate, text: str
) -> Iterator[Piece]:
    """Numbers and truth values in the arguments of tool calls that the template does not print.

    Marks cannot be put around them. All numbers are replaced by others at once; truth values, and
    numbers whose stand-in is not found, are changed one by one, and the text must change.
    """
    found: list[tuple[int, Any]] = []

    def stand_in(owner: int, value: Any) -> Any:
        found.append((owner, value))
        # True is an int for isinstance. It has one other value, too common to look for.
        if isinstance(value, bool):
            return value
        number = _FIRST_NUMBER + len(found)
        # A float stays one that is not whole: templates may print 2.0 as 2.
        return number + 0.5 if isinstance(value, float) else number

    replaced = _with_values(conversation, stand_in)
    if not found:
        return
    try:
        printed = template.render(replaced)
    except RefusedByTemplate:
        # It looks at the numbers, so they have to be changed one by one.
        printed = ""
    for k, (owner, value) in enumerate(found):
        # The first one, k = 0, was replaced when ``found`` held one.
        seen = not isinstance(value, bool) and str(_FIRST_NUMBER + k + 1) in printed
        if not seen and not _changes(conversation, template, text, k):
            yield Piece(owner, "tool_calls", json.dumps(value))


def _changes(conversation: Conversation, template: ChatTemplate, text: str, number: int) -> bool:
    """Whether the text changes with one number or truth value (by its place among all)."""
    count = 0

    def change(_: int, value: Any) -> Any:
        nonlocal count
        count += 1
        if count - 1 != number:
            return value
        return not value if isinstance(value, bool) else value + 1

    try:
        return template.render(_with_values(conversation, change)) != text
    except RefusedByTemplate:
        # It looks at the value.
        return True


def _with_values(conversation: Conversation, change: Callable[[int, Any], Any]) -> Conversation:
    """The conversation with every number and truth value in arguments of tool calls changed."""

    def walk(value: Any, owner: int) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, owner) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(item, owner) for item in value]
        # bool is a kind of int.
        return change(owner, value) if isinstance(value, int | float) else value

    messages = list(conversation.messages)
    for i, message in enumerate(messages):
        if "tool_calls" not in message:
            continue
        calls = []
        for call in message["tool_calls"]:
            function = function_of(call)
            if "arguments" in function:
                function = {**function, "arguments": walk(function["arguments"], i)}
            # A call that is not nested is the function itself.
            calls.append({**call, "function": function} if "function" in call else function)
        messages[i] = {**message, "tool_calls": calls}
    return replace(conversation, messages=messages)


def _flags_left_out(
    conversation: Conversation, template: ChatTemplate, text: str
) -> Iterator[Piece]:
    """Other keys of a message that hold a number or truth value and do not change the text."""
    for i, message in enumerate(conversation.messages):
        for key, value in message.items():
            if key in _PLAIN_KEYS or not isinstance(value, int | float):
                continue
            messages = list(conversation.messages)
            messages[i] = {k: v for k, v in message.items() if k != key}
            try:
                same = template.render(replace(conversation, messages=messages)) == text
            except RefusedByTemplate:
                # The template needs the key, so it makes a difference.
                same = False
            if same:
                yield Piece(i, key, json.dumps(value))


_FIXES = {
    "reasoning": (
        "Use a chat template that prints it, or allow it: "
        "data.allow_left_out=[reasoning] (counted and reported)."
    ),
    "tool_calls": (
        "Use a chat template that prints every tool call, or write calls into the content."
    ),
    "content": "Use a chat template that prints it (and messages of this role), or move the text.",
    "name": "Use a chat template that prints it, or allow it: data.allow_left_out=[name].",
    "tools": "Use a chat template that prints tools, or allow it: data.allow_left_out=[tools].",
    "documents": (
        "Use a chat template that prints documents, or allow it: data.allow_left_out=[documents]."
    ),
}


def refuse_what_is_left_out(pieces: Iterable[Piece], allowed: Collection[str]) -> tuple[str, ...]:
    """Raise ``ValueError`` for the first piece that may not be left out.

    Args:
        pieces: what does not reach the text. It is read up to the first piece that is refused,
            because finding the next one may take another rendering.
        allowed: kinds that may be left out.
    Returns:
        The kinds that were left out, each once.
    """
    # A dict keeps the order, as a set would not.
    kinds: dict[str, None] = {}
    for piece in pieces:
        kinds[piece.kind] = None
        if piece.kind in allowed:
            continue
        raise ValueError(_left_out_message(piece))
    return tuple(kinds)


def _left_out_message(piece: Piece) -> str:
    excerpt = piece.text
    if len(excerpt) > _MAX_EXCERPT:
        excerpt = excerpt[: _MAX_EXCERPT - 3] + "..."
    if piece.kind in _FIXES:
        what = f"the {piece.kind}"
        fix = _FIXES[piece.kind]
    else:
        what = f"the key {piece.kind!r}"
        fix = "Remove the key from the data."
    # Tools and documents belong to no message.
    where = "" if piece.owner is None else f" of message {piece.owner + 1}"
    return f"the chat template leaves out {what}{where} ({excerpt!r}).\n  {fix}"
