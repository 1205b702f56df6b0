"""Write a config as YAML in which a comment above each option says what it means.

Comments are the first sentences of the docstrings that docs/options.md has whole.
"""

import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields
from typing import Any

import yaml

from megalora.config.reference import sections
from megalora.config.run import RunConfig

FILL_IN = "???"
"""What stands for a value that only the user knows: a config that still has one is not read."""
MARK = "  # <-- fill in"
"""What stands behind such a value."""
WIDTH = 100
"""Columns of a line."""


def explicit_options(
    config: RunConfig, always: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, Any]]:
    """Sections of a config without their defaults.

    Args:
        always: section -> keys that stay even where they are defaults.
    """
    tree: dict[str, dict[str, Any]] = {}
    for section, values in asdict(config).items():
        kept: dict[str, Any] = {}
        for key in fields(getattr(config, section)):
            value = values[key.name]
            if key.name in always.get(section, ()) or value != _default(key):
                kept[key.name] = value
        if kept:
            tree[section] = kept
    return tree


def commented_yaml(config: RunConfig, always: Mapping[str, tuple[str, ...]]) -> str:
    """YAML that ``load_config`` reads back equal, unless a value is ``FILL_IN``.

    Args:
        always: section -> keys that are written even where they are defaults.
    """
    tree = explicit_options(config, always)
    lines: list[str] = []
    for section in sections():
        if section.name not in tree:
            continue
        lines += ["", f"# {section.purpose}", f"{section.name}:"]
        for option in section.options:
            # Of train.lr, lr.
            key = option.name.rpartition(".")[2]
            if key not in tree[section.name]:
                continue
            lines.append(f"  # {one_line(option.meaning, WIDTH - 4)}")
            lines.append(_setting(key, tree[section.name][key]))
    return "\n".join([*lines[1:], ""])


def one_line(meaning: str, width: int) -> str:
    """As many whole sentences of a docstring as fit into ``width`` columns; of a first sentence
    that does not, its beginning."""
    kept = ""
    # "q_proj ... down_proj" is no end of a sentence: what follows is neither large nor a literal.
    for sentence in re.split(r"(?<=\.)\s+(?=[A-Z0-9`])", meaning):
        longer = f"{kept} {sentence}".strip().replace("``", "")
        if len(longer) > width:
            break
        kept = longer
    return kept or textwrap.shorten(meaning.replace("``", ""), width, placeholder=" ...")


def _setting(key: str, value: Any) -> str:
    """The line of one key and its value, below a section."""
    # A list of one, of which the brackets go: a value by itself would end with a line of dots.
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6)
    line = f"  {key}: {text.strip()[1:-1]}"
    return line + MARK if value == FILL_IN else line


def _default(key: Field[Any]) -> object:
    """The value that a key has where nobody sets it; ``MISSING`` where it must be set."""
    return key.default if key.default_factory is MISSING else key.default_factory()
