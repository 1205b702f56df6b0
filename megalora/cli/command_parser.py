"""Add commands whose ``--help`` has a description, an example, and every default."""

import argparse
from typing import Any, NoReturn

from megalora.paths import user_path
from megalora.user_error import MISTAKE

_NOT_SHOWN = (None, False, "", [], argparse.SUPPRESS)
"""Defaults that mean nothing is given."""


class _HelpFormatter(argparse.HelpFormatter):
    """Writes the default behind the help of each option that has one and does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        # Positional arguments are required, or have a default that their help explains.
        is_shown = action.option_strings and action.default not in _NOT_SHOWN
        if is_shown and "default" not in text:
            text += " (default: %(default)s)"
        return text


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments; argparse's own would print the usage of
    all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def add_command(
    commands: Any, name: str, *, help: str, example: str, more: str = ""
) -> argparse.ArgumentParser:
    """Add a command to argparse's subcommands.

    Args:
        help: what it does, in one line of the list of commands.
        example: a whole command that does something useful.
        more: further sentences for its own ``--help``.
    """
    description = f"{help[0].upper()}{help[1:]}. {more}".strip()
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example: {example}",
        formatter_class=_HelpFormatter,
    )


def add_config_arguments(parser: argparse.ArgumentParser, *, nargs: Any = None) -> None:
    """Add a config file and overrides of its options."""
    # nargs: None would be passed on as a number of words.
    how = {} if nargs is None else {"nargs": nargs}
    parser.add_argument("config", type=user_path, help="the run's YAML file", **how)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="options in place of those in the file; megalora options lists them",
    )
