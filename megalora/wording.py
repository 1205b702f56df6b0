"""Words of messages: a list of names cut after the first few, a foreign value in one short line."""

import reprlib
from collections.abc import Iterable, Sized
from typing import Any, Protocol

NAMED = 3
"""Names in a message before the rest is left out."""


class Names(Sized, Iterable[object], Protocol):
    """A list, set or dict of what can be named."""


def first_few(names: Names, limit: int = NAMED) -> str:
    """The first ``limit`` names and ``...`` where there are more: ``q_proj, k_proj, ...``"""
    first = [str(name) for name, _ in zip(names, range(limit), strict=False)]
    return ", ".join(first) + (", ..." if len(names) > limit else "")


def shorten(value: Any) -> str:
    """A value from a user's file in one short line, whatever its size: long texts, lists and
    objects are cut."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr(maxstring=80, maxother=80, maxlong=40, maxlist=8, maxdict=8)


def typed(value: object) -> str:
    """A value's type, and the value in one short line: ``int 3``."""
    return f"{type(value).__name__} {repr(value)[:60]}"
