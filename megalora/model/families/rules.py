"""Rules for one field of a ``config.json``: which values a family computes.

A rule takes the value and returns what it should have been, or None when it is that. ``fields.py``
makes the message: ``config.json has NAME=VALUE; it must be RULE``.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

type Rule = Callable[[Any], str | None]


def whole(least: int, *, even: bool = False) -> Rule:
    """A whole number of at least ``least``; ``true`` is none, though Python counts it as 1."""

    def rule(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        fits = fits and (not even or value % 2 == 0)
        return None if fits else f"{'an even' if even else 'a whole'} number of at least {least}"

    return rule


def positive(value: Any) -> str | None:
    """A finite number above 0."""
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value <= sys.float_info.max
    )
    return None if fits else "a number above 0"


def flag(value: Any) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else "true or false"


def layer_numbers(value: Any) -> str | None:
    """A list of layer numbers."""
    is_layer = whole(0)
    fits = isinstance(value, list) and all(is_layer(layer) is None for layer in value)
    return None if fits else "a list of layer numbers from 0 on"


def or_null(rule: Rule) -> Rule:
    """What ``rule`` takes, or null."""

    def or_nothing(value: Any) -> str | None:
        text = None if value is None else rule(value)
        return f"{text}, or null" if text else None

    return or_nothing


def only(*values: Any, because: str) -> Rule:
    """One of ``values``; ``because`` tells the user why no other is computed."""

    def rule(value: Any) -> str | None:
        # JSON tells 0 from false; 0 and 0.0 are one number.
        same = [v for v in values if v == value and isinstance(v, bool) == isinstance(value, bool)]
        return None if same else f"{' or '.join(json.dumps(v) for v in values)}: {because}"

    return rule
