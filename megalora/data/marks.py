"""Put invisible marks around every value of a conversation, and find them in the template's text.

A chat template is a program: what it prints of a conversation can only be seen by running it. The
conversation is rendered once more with private-use characters around each value. If the text
without them is the text as it was, then each pair shows where a value stands, wherever the
template moved it, and a pair that is missing or not whole shows what was left out.

White space at the ends of a value stays outside its marks, because many templates strip it.
Tags that some templates look for (``<think>``, ``<tool_response>`` ...) stay outside as well, so
one string may consist of several pieces.
"""

import html
import json
import re
from collections.abc import Container
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from megalora.data.conversation import Conversation
from megalora.data.messages import REASONING, Message, function_of

Span = tuple[int, int]
"""First character, and the one after the last."""

_THINKING = r"think|thinking|thought|reasoning|seed:think"
_TAGS = re.compile(
    rf"(</?(?:{_THINKING}|tool_call|tool_response|function_call)>|\[/?THINK\])", re.IGNORECASE
)
_OPENS_REASONING = re.compile(rf"<(?:{_THINKING})>|\[THINK\]", re.IGNORECASE)
_CLOSES_REASONING = re.compile(rf"</(?:{_THINKING})>|\[/THINK\]", re.IGNORECASE)

_CHANGES_NOTHING = ("role", "id", "tool_call_id", "index")
"""Keys of messages and calls that say who speaks or tie a result to its call; templates compare
them, so that a mark in them would change the text."""
_SHOWN_OF_TOOLS = ("name", "description")
"""Keys of a tool whose values every template that shows tools prints."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A string of the conversation that has to reach the template's text."""

    owner: int | None
    """Index of its message; None for tools and documents."""
    kind: str
    """content, reasoning, tool_calls, tools, documents or another key of the message."""
    text: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A template's text without the marks, and where they were."""

    text: str
    spans: dict[int, list[Span]] = field(default_factory=dict)
    """Spans by the number of the piece; a piece that was printed twice has two."""
    last: tuple[int, int, int] | None = None
    """(piece, which of its spans, its end) for the last mark in the text."""


class Alphabet:
    """32 neighbouring private-use characters: 16 digits, and signs for start and end of a mark."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.digits = "".join(map(chr, range(base, base + 16)))
        self.start = chr(base + 16)
        self.end = chr(base + 17)
        # A mark is its sign and the number of the piece in four digits.
        digit = f"[{self.digits[0]}-{self.digits[-1]}]"
        self.mark = re.compile(f"([{self.start}{self.end}])({digit}{{4}})")
        # As JSON or Python write such a character when they keep to ASCII. A run of backslashes is
        # looked at once, from its beginning: otherwise a long one takes quadratic time.
        tens = f"(?:{base >> 4:03x}|{(base >> 4) + 1:03x})"
        self.escaped = re.compile(rf"(?<!\\)\\+u({tens}[0-9a-f])", re.IGNORECASE)

    def occurs_in(self, text: str) -> bool:
        """Whether the text holds one of the characters, as it is or escaped."""
        if "\\u" in text and self.escaped.search(text):
            return True
        return re.search(f"[{chr(self.base)}-{chr(self.base + 31)}]", text) is not None

    def around(self, text: str, number: int) -> str:
        """The text between the two marks of piece ``number``."""
        # Four hexadecimal digits, the highest first.
        code = "".join(self.digits[int(digit, 16)] for digit in f"{number:04x}")
        return f"{self.start}{code}{text}{self.end}{code}"

    def number(self, code: str) -> int:
        """The number that four digits of a mark stand for."""
        number = 0
        for digit in code:
            number = number * 16 + ord(digit) - self.base
        return number

    def parse(self, text: str) -> Rendered:
        """Take the marks out of a text and note where they stood."""
        if "\\u" in text:
            text = self.escaped.sub(lambda match: chr(int(match[1], 16)), text)
        plain: list[str] = []
        # Where we are: in the text without marks, and in the one with them.
        position = 0
        place = 0
        # Where the pieces begin whose end has not come yet.
        opened: dict[int, int] = {}
        spans: dict[int, list[Span]] = {}
        last = None
        for match in self.mark.finditer(text):
            plain.append(text[place : match.start()])
            position += match.start() - place
            place = match.end()
            number = self.number(match[2])
            if match[1] == self.start:
                opened[number] = position
            # An end without a start: the template has cut the value's beginning off.
            elif number in opened:
                spans.setdefault(number, []).append((opened.pop(number), position))
                last = (number, len(spans[number]) - 1, position)
        plain.append(text[place:])
        return Rendered("".join(plain), spans, last)


@lru_cache
def _alphabet(base: int) -> Alphabet:
    return Alphabet(base)


def unused_alphabet(text: str) -> Alphabet:
    """The first alphabet of which the text holds nothing, so that no mark is found by chance."""
    # The private use area of Unicode's basic plane.
    for base in range(0xE000, 0xF900, 32):
        alphabet = _alphabet(base)
        # Most texts are ASCII without escapes, and need no search.
        if (text.isascii() and "\\u" not in text) or not alphabet.occurs_in(text):
            return alphabet
    raise ValueError(
        "the text holds private-use characters from every part of U+E000 to U+F8FF, so that none"
        " is left to mark values with; remove them from the data"
    )


class _Marker:
    """Walks through a conversation, numbers its pieces, and marks those that are chosen."""

    def __init__(self, alphabet: Alphabet, chosen: Container[int] | None) -> None:
        self.alphabet = alphabet
        self.chosen = chosen
        self.pieces: list[Piece] = []

    def piece(self, value: str, owner: int | None, kind: str) -> str:
        """One string as one piece; white space at its ends stays outside the marks."""
        core = value.strip()
        if not core:
            return value
        # Chosen or not, every piece has its number, so that numbers are the same in every call.
        number = len(self.pieces)
        if number >= 16**4:
            raise ValueError(f"has more than {16**4:,} values; split the row")
        self.pieces.append(Piece(owner, kind, core))
        if self.chosen is not None and number not in self.chosen:
            return value
        start = len(value) - len(value.lstrip())
        marked = self.alphabet.around(core, number)
        return value[:start] + marked + value[start + len(core) :]

    def content(self, value: str, owner: int, kind: str = "content") -> str:
        """A string that may hold tags which templates look for."""
        # Texts at even places, the tags between them at odd ones.
        parts = _TAGS.split(value)
        has_text = any(part.strip() for part in parts[::2])
        # A value of tags alone is one piece, or nothing would be looked for.
        if len(parts) == 1 or not has_text:
            return self.piece(value, owner, kind)
        for i in range(0, len(parts), 2):
            before = parts[i - 1] if i else ""
            after = parts[i + 1] if i + 1 < len(parts) else ""
            thinks = _OPENS_REASONING.fullmatch(before) or _CLOSES_REASONING.fullmatch(after)
            parts[i] = self.piece(parts[i], owner, "reasoning" if thinks else kind)
        return "".join(parts)

    def tree(self, value: Any, owner: int | None, kind: str) -> Any:
        """Every string in a JSON value, keys of objects included."""
        if isinstance(value, str):
            return self.piece(value, owner, kind)
        if isinstance(value, dict):
            marked = {}
            for key, item in value.items():
                # Before the item: pieces are numbered in the order in which they are printed.
                marked_key = self.piece(str(key), owner, kind)
                marked[marked_key] = self.tree(item, owner, kind)
            return marked
        if isinstance(value, list):
            return [self.tree(item, owner, kind) for item in value]
        return value

    def tools(self, value: Any) -> Any:
        """Names and descriptions; how the rest of a schema is printed is up to the template."""
        if isinstance(value, list):
            return [self.tools(item) for item in value]
        if not isinstance(value, dict):
            return value
        marked = {}
        for key, item in value.items():
            if key in _SHOWN_OF_TOOLS and isinstance(item, str):
                marked[key] = self.piece(item, None, "tools")
            else:
                marked[key] = self.tools(item)
        return marked

    def document(self, value: dict[str, Any]) -> dict[str, Any]:
        """A document for retrieval: its strings, such as title and text."""
        marked = {}
        for key, item in value.items():
            if isinstance(item, str) and key not in _CHANGES_NOTHING:
                marked[key] = self.piece(item, None, "documents")
            else:
                marked[key] = item
        return marked

    def call(self, call: dict[str, Any], owner: int) -> dict[str, Any]:
        """A tool call: its name, its arguments, and what else it may hold."""
        function = function_of(call)
        marked = {}
        for key, value in function.items():
            # "type": "function" is what templates compare with.
            if key in (*_CHANGES_NOTHING, "function") or (key, value) == ("type", "function"):
                marked[key] = value
            else:
                marked[key] = self.tree(value, owner, "tool_calls")
        if function is call:
            return marked
        # What stands around the function, such as id and type, is treated as a call without one.
        outer = {key: value for key, value in call.items() if key != "function"}
        return {**self.call(outer, owner), "function": marked}

    def message(self, message: Message, owner: int, called: set[str]) -> Message:
        """A message; ``called`` collects the names of the functions that are called in it."""
        marked: Message = {}
        for key, value in message.items():
            if key in _CHANGES_NOTHING or _repeats_a_call(key, message, called):
                marked[key] = value
            elif key == "content":
                marked[key] = self.content(value, owner)
            elif key == "tool_calls":
                marked[key] = []
                for call in value:
                    marked[key].append(self.call(call, owner))
                    called.add(function_of(call)["name"])
            elif key in REASONING and isinstance(value, str):
                marked[key] = self.content(value, owner, "reasoning")
            else:
                marked[key] = self.tree(value, owner, key)
        return marked


def _repeats_a_call(key: str, message: Message, called: set[str]) -> bool:
    """Whether a tool result only repeats the name of a function that a call before it has."""
    return key == "name" and message["role"] == "tool" and message["name"] in called


def mark(
    conversation: Conversation, alphabet: Alphabet, chosen: Container[int] | None = None
) -> tuple[Conversation, list[Piece]]:
    """The conversation with marks around its pieces, and the pieces.

    Args:
        conversation: cleaned.
        alphabet: characters that occur nowhere in its text.
        chosen: numbers of the pieces to mark; None means all. All are numbered in any case.
    Raises:
        ValueError: more than 65,536 pieces.
    """
    marker = _Marker(alphabet, chosen)
    called: set[str] = set()
    messages = []
    for owner, message in enumerate(conversation.messages):
        messages.append(marker.message(message, owner, called))
    marked = replace(
        conversation,
        messages=messages,
        tools=marker.tools(conversation.tools),
    )
    if conversation.documents is not None:
        documents = [marker.document(document) for document in conversation.documents]
        marked = replace(marked, documents=documents)
    return marked, marker.pieces


def same_text(printed: str, text: str) -> bool:
    """Whether a template printed a text whole: as it is, or as JSON, HTML or Python write it."""
    if printed == text:
        return True
    # Words are compared, because text that is only indented or wrapped anew is whole.
    words = text.split()
    forms = (printed, html.unescape(printed), *_read(printed))
    return any(form.split() == words for form in forms)


def _read(printed: str) -> list[str]:
    """What a JSON or Python string that is written like this holds; JSON may be in JSON."""
    forms: list[str] = []
    for _ in range(2):
        # repr writes text with a double quote in single quotes; JSON wants that quote escaped.
        double_quoted = printed.replace("\\'", "'").replace('"', '\\"')
        for form in (printed, double_quoted):
            try:
                printed = json.loads(f'"{form}"', strict=False)
            except ValueError:
                continue
            forms.append(printed)
            break
    return forms
