"""Check fields of a quantisation's settings against a table of rules."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from megalora.model.families.rules import Rule

ANY: Rule = lambda value: None  # noqa: E731
"""A field that changes no stored value."""


def NAMES(value: Any) -> str | None:
    """A list of names, or null."""
    if value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        return None
    return "a list of module names"


def YES_OR_NO(value: Any) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else "true or false"


def checked(
    settings: Mapping[str, Any],
    rules: Mapping[str, Rule],
    needed: Iterable[str] = (),
    where: str = "",
) -> None:
    """Raise ``ValueError`` for a field that is needed and absent, unknown and set, or of a value
    that is not read.

    Args:
        where: path of the settings within ``quantization_config``, with a dot at its end.
    """
    # Whatever a file has in place of an object.
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where.removesuffix('.')} is {json.dumps(settings)[:80]}, not an object")
    for name in needed:
        if name not in settings:
            raise ValueError(f"{where}{name} is missing")
    for name, value in settings.items():
        if name in rules:
            if wanted := rules[name](value):
                shown = json.dumps(value)[:80]
                raise ValueError(f"{where}{name} is {shown}; it must be {wanted}")
        elif name != "quant_method" and value not in (None, False, "", [], {}):
            raise ValueError(
                f"{where}{name} is {json.dumps(value)[:80]}, a field that megalora does not know:"
                " what it does to the weights would be ignored"
            )


def not_converted(settings: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """Modules that any of these fields lists."""
    found: list[str] = []
    for name in names:
        found += settings.get(name) or []
    return tuple(found)
