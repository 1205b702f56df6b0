"""Describe every option of a config: its values, its default, and its docstring.

The meaning of an option is the string below its field in ``megalora/config/``. From here come
``megalora options``, the JSON schema (``schema.py``) and docs/options.md.
"""

import ast
import difflib
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megalora.config import RunConfig
from megalora.config.type_words import alternatives

BASE_MEANING = (
    "The file whose options hold where this file gives none of its own, relative to this file."
)

_MOST_IN_A_CELL = 8
"""Keys of a mapping that are described where the mapping is; more have rows of their own."""


@dataclass(frozen=True)
class Option:
    """One key of a section, or of a mapping that is an option's value."""

    name: str
    """As in ``train.lr``."""
    hint: Any
    """Its annotation."""
    default: str
    """As YAML writes it; ``required`` where there is none."""
    meaning: str
    """One paragraph of reStructuredText, in one line."""

    @property
    def values(self) -> str:
        """What it takes, in words, with literal values in backticks."""
        return " or ".join(_values(self.hint))


@dataclass(frozen=True)
class Section:
    """One section of a config."""

    name: str
    purpose: str
    """One sentence."""
    options: tuple[Option, ...]


def sections() -> list[Section]:
    """All sections with all options, in the order of the config."""
    hints = get_type_hints(RunConfig)
    found = []
    for field in fields(RunConfig):
        cls = hints[field.name]
        # Modules of megalora/config begin with "The NAME section: what it is about."
        about = inspect.getdoc(inspect.getmodule(cls)) or ""
        purpose = about.splitlines()[0].partition("section: ")[2]
        purpose = purpose[0].upper() + purpose[1:]
        found.append(Section(field.name, purpose, options_of(cls, f"{field.name}.")))
    return found


def options_of(cls: type, where: str) -> tuple[Option, ...]:
    """The fields of a section's class, or of another mapping's; ``where`` stands before their
    names.

    Raises:
        ValueError: a field has no docstring.
    """
    meanings = field_docstrings(cls)
    hints = get_type_hints(cls)
    found = []
    for field in fields(cls):
        name = f"{where}{field.name}"
        found.append(Option(name, hints[field.name], _default(field), meanings[field.name]))
    return tuple(found)


def with_keys(option: Option) -> list[Option]:
    """The option, and behind it the keys of a mapping that has too many for one cell."""
    found = [option]
    for alternative in alternatives(option.hint):
        if is_dataclass(alternative) and len(fields(alternative)) > _MOST_IN_A_CELL:
            found += options_of(alternative, f"{option.name}.")  # pyright: ignore[reportArgumentType]
    return found


def find(name: str) -> list[Option]:
    """The options of a section, or the one option of that name.

    Raises:
        ValueError: there is no such section or option; names the nearest one.
    """
    known: dict[str, list[Option]] = {}
    for section in sections():
        known[section.name] = list(section.options)
        for option in section.options:
            known[option.name] = with_keys(option)
            for key in known[option.name][1:]:
                known[key.name] = [key]
    if name in known:
        return known[name]
    # Someone who remembers rank, and not where it stands.
    ending = [full for full in known if full.endswith(f".{name}")]
    close = ending or difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else f"sections: {', '.join(_short(known))}"
    )
    raise ValueError(f"there is no section or option {name}; {hint}")


def _short(known: dict[str, list[Option]]) -> list[str]:
    return [name for name in known if "." not in name]


def field_docstrings(cls: type) -> dict[str, str]:
    """The string below each annotated field of a class, in one line, by field name.

    Raises:
        ValueError: a field has no docstring.
    """
    # Python keeps no docstring of an attribute: to it, the string below a field is an expression
    # that nobody uses. So it is read from the source.
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
    found = {}
    # Each statement with the one after it, which for a documented field is its docstring.
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = ast.unparse(statement.target)
        text = following.value if isinstance(following, ast.Expr) else None
        if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
            raise ValueError(f"{cls.__name__}.{name} has no docstring; docs/options.md needs one")
        # In one line, since it stands in a cell of a table.
        found[name] = " ".join(text.value.split())
    return found


def _values(hint: Any) -> Iterator[str]:
    """What a type hint allows, in words, one alternative after the other."""
    for option in alternatives(hint):
        if get_origin(option) is Literal:
            yield ", ".join(f"`{value}`" for value in get_args(option))
        # Source and RecomputeLayers, whose keys have no row of their own in the page.
        elif is_dataclass(option):
            if len(fields(option)) > _MOST_IN_A_CELL:
                yield "a mapping of its keys"
                continue
            parts = []
            for name, inner in get_type_hints(option).items():
                parts.append(f"`{name}` ({' or '.join(_values(inner))})")
            yield f"a mapping of {', '.join(parts)}"
        elif get_origin(option) in (list, tuple):
            yield f"a list of: {' or '.join(_values(get_args(option)[0]))}"
        elif get_origin(option) is dict:
            yield f"a mapping to {' or '.join(_values(get_args(option)[1]))}"
        else:
            words = {int: "integer", float: "number", str: "text", bool: "true, false"}
            yield "null" if option is types.NoneType else words[option]


def _default(field: Field) -> str:
    """A field's default as YAML writes it."""
    # Lists and mappings.
    if field.default_factory is not MISSING:
        return str(field.default_factory())
    if field.default is MISSING:
        return "required"
    if field.default is None:
        return "null"
    # YAML writes true where Python writes True.
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return str(field.default)
