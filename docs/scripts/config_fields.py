"""Fill docs/base.md's table of config fields from the rules of every registered family."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from docs.scripts.sections import fill
from megalora.model.families import FAMILIES
from megalora.model.families.rules import Rule

PAGE = Path(__file__).parents[2] / "docs/base.md"
NO_VALUE = object()
"""Value that no rule accepts: every rule answers it with the values that it does accept."""


def page() -> str:
    """docs/base.md with a current table."""
    return fill(PAGE.read_text(), {"fields": table})


def table() -> str:
    """A row for each rule: its fields, the values it accepts, the families that have it."""
    lines = ["| field | values | families |", "|---|---|---|"]
    for (values, families), fields in _fields_by_meaning().items():
        names = ", ".join(_code(fields))
        lines.append(f"| {names} | {_cell(values)} | {_cell(_names(families))} |")
    # Rotary scaling is a nested mapping with several spellings, which rope_fields.py reads; it has
    # no single rule that could stand among the fields above.
    for kinds, families in _families_by_rotary().items():
        lines.append(f"| rotary embeddings | {', '.join(kinds)} | {_cell(_names(families))} |")
    return "\n".join(lines)


def _fields_by_meaning() -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """(values, families) -> fields, in the order in which the families list them."""
    # Two families may have different rules for a field of the same name, so every field has a list
    # of families for each meaning.
    families_of: dict[str, dict[str, list[str]]] = {}
    for model_type, family in FAMILIES.items():
        rules: Mapping[str, Rule] = {**family.sizes, **family.others}
        for field, rule in rules.items():
            meaning = rule(NO_VALUE)
            # None would mean that the rule accepts the value.
            assert meaning is not None
            families_of.setdefault(field, {}).setdefault(meaning, []).append(model_type)
    # Turned round: fields with the same meaning in the same families share a row of the table.
    fields: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for field, meanings in families_of.items():
        for meaning, families in meanings.items():
            fields.setdefault((meaning, tuple(families)), []).append(field)
    return fields


def _families_by_rotary() -> dict[tuple[str, ...], tuple[str, ...]]:
    """Kinds of rotary scaling -> the families that compute these."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for model_type, family in FAMILIES.items():
        found[family.rope_kinds] = (*found.get(family.rope_kinds, ()), model_type)
    return found


def _names(families: tuple[str, ...]) -> str:
    return "all" if len(families) == len(FAMILIES) else ", ".join(_code(families))


def _code(names: Iterable[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def _cell(text: str) -> str:
    # A bare | would end the cell.
    return text.replace("|", "\\|")
