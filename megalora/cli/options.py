"""Read the arguments of ``megalora options``, and print options and their meaning."""

import json
import shutil
import textwrap
from typing import Any

from megalora.cli.command_parser import add_command
from megalora.config.reference import BASE_MEANING, Option, find, sections


def add_options_command(commands: Any) -> None:
    """Add the command to argparse's subcommands."""
    options = add_command(
        commands,
        "options",
        help="show the options of a config: values, defaults, meaning",
        example="megalora options train.recompute",
    )
    options.add_argument(
        "name",
        nargs="?",
        metavar="SECTION or SECTION.KEY",
        help="section or option to explain; without it, all are listed",
    )
    options.add_argument(
        "--schema",
        action="store_true",
        help="print a JSON schema instead, by which editors complete and check config files",
    )
    options.set_defaults(action=_options)


def _options(options: Any, _: list[str]) -> None:
    if options.schema:
        if options.name:
            raise ValueError(f"--schema is of the whole config; leave {options.name} out")
        from megalora.config.schema import schema

        print(json.dumps(schema(), indent=1))
    # Of a section all options, each as it is by itself.
    elif options.name:
        print("\n\n".join(map(_explained, find(options.name))))
    else:
        print(_list())


def _list() -> str:
    """All options with their defaults, by section."""
    lines = [*_wrapped(f"base  {BASE_MEANING}", "      ")]
    for section in sections():
        lines.append(f"\n{section.name}: {section.purpose}")
        # Without meanings: all options are to be seen on one or two screens.
        for option in section.options:
            lines.append(f"  {option.name:<30} {option.default}")
    lines.append("\nmegalora options SECTION explains its options, SECTION.KEY one of them")
    return "\n".join(lines)


def _explained(option: Option) -> str:
    """An option's values, default and meaning."""
    values = option.values.replace("`", "")
    default = "required" if option.default == "required" else f"default {option.default}"
    lines = _wrapped(f"{option.name}: {values}; {default}", "    ")
    lines += _wrapped(f"    {option.meaning.replace('``', '')}", "    ")
    return "\n".join(lines)


def _wrapped(text: str, indent: str) -> list[str]:
    """Lines of the terminal's width, of at most 100 characters; all but the first are indented."""
    width = min(100, shutil.get_terminal_size().columns)
    # A list of values may be broken between words, a name nowhere.
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
