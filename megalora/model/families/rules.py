"""Rules for one field of a ``config.json``: which values a family computes.

A rule takes the value and returns None where megalora computes it, else the values that it does
compute, in words. ``fields.py`` makes the message: ``config.json has NAME=VALUE; it must be RULE``.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

type Rule = Callable[[Any], str | None]


MAX_LAYERS = 10_000
MAX_EXPERTS = 100_000
"""Published models have up to some 130 layers and 400 experts in each."""
LARGEST_SIZE = 2**31 - 1
"""Sizes are checked before a loop or an allocation takes them; no model has a larger one."""


def whole(least: int, most: int = LARGEST_SIZE, *, even: bool = False) -> Rule:
    """A whole number of at least ``least`` and at most ``most``."""
    wanted = f"{'an even' if even else 'a whole'} number of at least {least}"

    def rule(value: Any) -> str | None:
        # Python counts true as 1, JSON does not.
        if isinstance(value, bool) or not isinstance(value, int):
            return wanted
        if value > most:
            return f"{wanted} and at most {most}"
        if value < least or (even and value % 2 != 0):
            return wanted
        return None

    return rule


def positive(value: Any) -> str | None:
    """A finite number above 0."""
    # NaN fails the comparisons; true is no number in JSON.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= sys.float_info.max:
        return None
    return "a number above 0"


def flag(value: Any) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else "true or false"


def layer_numbers(value: Any) -> str | None:
    """A list of layer numbers."""
    is_layer = whole(0)
    if isinstance(value, list) and all(is_layer(layer) is None for layer in value):
        return None
    return "a list of layer numbers from 0 on"


def or_null(rule: Rule) -> Rule:
    """Any value that ``rule`` accepts, or null."""

    def or_nothing(value: Any) -> str | None:
        if value is None:
            return None
        wanted = rule(value)
        return f"{wanted}, or null" if wanted else None

    return or_nothing


def only(*values: Any, because: str) -> Rule:
    """One of ``values``; ``because`` tells the user why no other is computed."""
    accepted = " or ".join(map(json.dumps, values))

    def rule(value: Any) -> str | None:
        for one in values:
            # 0 and 0.0 are one number in JSON, 0 and false are not.
            if one == value and isinstance(one, bool) == isinstance(value, bool):
                return None
        return f"{accepted}: {because}"

    return rule
