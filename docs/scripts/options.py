"""Write docs/options.md: every key of a config with its values, default and meaning.

The meaning is the docstring below the field in ``megalora/config/``; a field without one is an
error, so that the page lists all keys.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megalora.config import RunConfig

HEAD = """# Options

Every key of a config file, by section. On the command line any of them can be overridden as
`section.key=value`, for example `train.lr=2e-4` or `lora.target_modules=[q_proj,v_proj]`. A mapping
replaces the mapping before it: `lora.rank_pattern={q_proj: 8}` leaves no other entry, and
`lora.rank_pattern.q_proj=8` leaves all others. An unknown key is an error that names the nearest
known one.

`base: other.yaml` beside the sections takes what a file does not say from another one.

This page is written from the docstrings in [`megalora/config`](../megalora/config) by `make docs`.
"""


def page() -> str:
    """The whole page as Markdown."""
    hints = get_type_hints(RunConfig)
    sections = [_section(field.name, hints[field.name]) for field in fields(RunConfig)]
    return "\n".join([HEAD, *sections])


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


def _section(name: str, cls: type) -> str:
    """One section: its heading, the first line of its module, and a table of its keys."""
    # Modules of megalora/config begin with "The NAME section: what it is about."
    about = inspect.getdoc(inspect.getmodule(cls)) or ""
    purpose = about.splitlines()[0].partition("section: ")[2]
    meanings = field_docstrings(cls)
    hints = get_type_hints(cls)
    lines = [f"## `{name}`\n", f"{purpose[0].upper()}{purpose[1:]}\n"]
    lines += ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(cls):
        values = " or ".join(_values(hints[field.name]))
        # From reStructuredText to Markdown; a bare | would end the cell.
        meaning = meanings[field.name].replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{name}.{field.name}` | {values} | {_default(field)} | {meaning} |")
    return "\n".join([*lines, ""])


def _values(hint: Any) -> Iterator[str]:
    """What a type hint allows, in words, one alternative after the other."""
    # ``Optional[int]`` has the origin Union, ``int | None`` UnionType: both are alternatives.
    if get_origin(hint) in (Union, types.UnionType):
        for alternative in get_args(hint):
            yield from _values(alternative)
    elif get_origin(hint) is Literal:
        yield ", ".join(f"`{value}`" for value in get_args(hint))
    elif is_dataclass(hint):
        parts = []
        for name, inner in get_type_hints(hint).items():
            parts.append(f"`{name}` ({' or '.join(_values(inner))})")
        yield f"a mapping of {', '.join(parts)}"
    elif get_origin(hint) is list:
        yield f"a list of: {' or '.join(_values(get_args(hint)[0]))}"
    elif get_origin(hint) is dict:
        yield f"a mapping to {' or '.join(_values(get_args(hint)[1]))}"
    else:
        words = {int: "integer", float: "number", str: "text", bool: "true, false"}
        yield "null" if hint is types.NoneType else words[hint]


def _default(field: Field) -> str:
    """A field's default as YAML writes it."""
    if field.default_factory is not MISSING:
        empty = field.default_factory()
        return f"`{empty}`"
    if field.default is MISSING:
        return "required"
    if field.default is None:
        return "`null`"
    # YAML writes true where Python writes True.
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`"
