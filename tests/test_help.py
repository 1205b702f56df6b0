"""Check that each command's ``--help`` says what it does, shows a command that works, and every
default."""

import argparse
import shlex

import pytest

from megalora.cli import main as cli
from tests.test_docs import parse_problem

COMMANDS: dict[str, argparse.ArgumentParser] = {}
for _action in cli._parser()._actions:
    if isinstance(_action, argparse._SubParsersAction):
        COMMANDS |= _action.choices


def test_there_are_commands() -> None:
    assert {"tiny", "init", "train", "data", "options", "plan", "bench", "export"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_description_and_an_example_that_parses(name: str) -> None:
    command = COMMANDS[name]
    description = command.description or ""
    assert description.endswith(".") and description[0].isupper()
    words = shlex.split(command.epilog or "")
    assert words[:3] == ["example:", "megalora", name]
    assert parse_problem(words[2:]) is None
    # More than the bare command, which no example needs to show.
    assert len(words) > 3
    shown = " ".join(command.format_help().split())
    assert " ".join(description.split()) in shown and "example: megalora" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_is_explained_with_its_default(name: str) -> None:
    command = COMMANDS[name]
    for action in command._actions:
        assert action.help, f"megalora {name}: {action.dest} has no help"
        has_default = action.default not in (None, False, "", [], argparse.SUPPRESS)
        if action.option_strings and has_default:
            shown = command._get_formatter()._get_help_string(action) or ""
            assert "default" in shown, f"megalora {name} {action.option_strings[0]}: {shown}"
            # In its own words, or as the number that it is.
            if "%(default)s" not in (action.help or "") and shown != action.help:
                assert f"(default: {action.default})" in shown % vars(action)
