"""Shorten lists of names and values of others for messages."""

import itertools
import re
import reprlib
from collections.abc import Iterable, Sized
from typing import Any, Protocol

NAMED = 3
"""Number of names in a message, after which the rest is left out."""


class Names(Sized, Iterable[object], Protocol):
    """A list, set or dict of names."""


def first_few(names: Names, limit: int = NAMED) -> str:
    """The first ``limit`` names and ``...`` where there are more: ``q_proj, k_proj, ...``"""
    # A slice would not do: a set has none.
    first = [str(name) for name in itertools.islice(names, limit)]
    if len(names) > limit:
        first.append("...")
    return ", ".join(first)


def shorten(value: Any) -> str:
    """A value from a user's file in one short line, whatever its size: long texts, lists and
    objects are cut."""
    return _SHORT.repr(value)


_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
"""Sequences with which a terminal is told to clear itself, to colour, to change its title."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """A text of others without what a terminal would obey: escape sequences, and all control
    characters but tabs and line feeds."""
    return _CONTROL.sub("", _ESCAPES.sub("", text))


# Limits in characters, but for the last two: numbers of items.
_SHORT = reprlib.Repr(maxstring=80, maxother=80, maxlong=40, maxlist=8, maxdict=8)


def typed(value: object) -> str:
    """A value's type, and the value in one short line: ``int 3``."""
    return f"{type(value).__name__} {repr(value)[:60]}"
