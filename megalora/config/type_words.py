"""Say in words what values a field of a config takes, for messages and for documentation."""

import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

ONE: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "nothing",
}
SEVERAL: dict[Any, str] = {int: "integers", float: "numbers", str: "texts"}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of which a value may have any."""
    # ``Optional[int]`` has the origin Union, ``int | None`` UnionType.
    if get_origin(hint) in (Union, types.UnionType):
        return get_args(hint)
    return (hint,)


def in_words(hint: Any) -> str:
    """A type hint as a sentence has it: ``text or a list of integers``."""
    return " or ".join(map(_one, alternatives(hint)))


def _one(option: Any) -> str:
    """One value of a type without alternatives."""
    if get_origin(option) is Literal:
        return f"one of {', '.join(get_args(option))}"
    if is_dataclass(option):
        return f"a mapping of {', '.join(f.name for f in fields(option))}"
    # tuple[int, ...] is written as a list too.
    if get_origin(option) in (list, tuple):
        return f"a list of {_several(get_args(option)[0])}"
    if get_origin(option) is dict:
        _, value_type = get_args(option)
        return f"a mapping to {_several(value_type)}"
    return ONE[option]


def _several(option: Any) -> str:
    """Several values of a type without alternatives."""
    if get_origin(option) is Literal:
        return f"values out of {', '.join(get_args(option))}"
    if is_dataclass(option):
        return f"mappings of {', '.join(f.name for f in fields(option))}"
    return SEVERAL[option]
