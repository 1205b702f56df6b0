"""PEFT's rules for which module a name or a regular expression means, matched within a time limit.

    where                              an entry E means a module when
    target_modules as a list           its name is E, or ends in E from a dot on (``ends_in``)
    target_modules as a string         E matches the whole name (``Pattern.fullmatch``)
    exclude_modules                    as target_modules
    rank_pattern's, alpha_pattern's    E matches the name's end from a dot on (``end_pattern``); the
    keys                               first key that does decides

The ``lora`` section of a config follows the last rule for everything, so that its lists may hold
expressions too.

PEFT hands expressions to Python's ``re``. One such as ``(\\w+\\.?)+X`` takes it longer than anyone
waits: nested repetition has exponentially many ways to fail. Here ``re`` says whether an expression
is one, and ``regex``, which reads the same syntax and can stop, matches it.
"""

import re
import re._parser as _parser  # type: ignore[import-not-found]  private to Python; what re.compile calls first
import time
import warnings
from collections.abc import Callable, Collection
from typing import Any

import regex

from megalora.wording import shorten

SECONDS = 0.5
"""Processor time for one match. Module names have up to 80 characters; a sound expression needs
some microseconds."""
MAX_EXPANDED = 100_000
"""Characters of an expression in which every counted repetition is written out, as ``regex``
does."""
TOTAL_SECONDS = 20.0
"""For all matches of one expression. A model of 235B has 36,000 linears of experts."""
_LONE_BRACE = re.compile(r"(?<!\\)\{(?!\d+(?:,\d*)?\}|,\d+\})")


class Pattern:
    """A compiled expression that cannot hang."""

    def __init__(self, where: str, expression: str, said: str | None = None) -> None:
        """Compile an expression.

        Args:
            where: the option that the user must change and its file, for messages.
            expression: what is matched.
            said: what the user wrote, if ``expression`` is more than that.
        Raises:
            ValueError: it is not a regular expression, or its repetitions stand for too much.
        """
        self.where = where
        self.said = shorten(said or expression)
        self.spent_s = 0.0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # re's notes on syntax that may change
                re.compile(expression)
                if (size := _expanded(_parser.parse(expression))) > MAX_EXPANDED:
                    raise ValueError(f"its repetitions stand for {size:.3g} characters")
                # In re a brace that opens no repetition and "[:" are characters; in regex they may
                # mean a fuzzy match and a class of characters.
                literal = _LONE_BRACE.sub(r"\\{", expression).replace("[:", r"[\:")
                self._compiled = regex.compile(literal, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise ValueError(
                f"{where}: {self.said} is neither a name nor a regular expression ({reason})"
            ) from None

    def match(self, name: str) -> Any:
        """As ``re.match``. Raises ``ValueError`` when that takes too long."""
        return self._run(self._compiled.match, name)

    def fullmatch(self, name: str) -> Any:
        """As ``re.fullmatch``. Raises ``ValueError`` when that takes too long."""
        return self._run(self._compiled.fullmatch, name)

    def _run(self, match: Callable[..., Any], name: str) -> Any:
        start = time.process_time()
        try:
            found = match(name, timeout=SECONDS)
        except TimeoutError:
            found = None
            self.spent_s = TOTAL_SECONDS
        self.spent_s += time.process_time() - start
        if self.spent_s >= TOTAL_SECONDS:
            raise ValueError(
                f"{self.where}: {self.said} takes for ever on names such as {name}, in PEFT too."
                " Repetition within repetition does that; write the names out, or say it without"
            )
        return found


def end_pattern(where: str, entry: str, expression: str | None = None) -> Pattern:
    """The pattern whose ``match`` says whether ``entry`` means a module by its end, from a dot on.

    ``expression``: what stands for the entry, where it is an alias.
    """
    return Pattern(where, rf"(.*\.)?({expression or entry})$", said=entry)


def ends_in(name: str, targets: Collection[str]) -> bool:
    """Whether one of ``targets`` is the name, or its end from a dot on."""
    return not endings(name).isdisjoint(targets)


def endings(name: str) -> set[str]:
    """``{"a.b.c", "b.c", "c"}`` of ``a.b.c``."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _expanded(parsed: Any) -> int:
    """Length of an expression without counted repetition that matches the same; ``parsed`` as
    Python's parser returns it."""
    size = 0
    for _, argument in parsed:
        parts = argument if isinstance(argument, tuple | list) else (argument,)
        inner = sum(
            _expanded(part) for part in _flat(parts) if isinstance(part, _parser.SubPattern)
        )
        counts = [n for n in parts if isinstance(n, int) and n != _parser.MAXREPEAT]
        is_repeat = len(parts) == 3 and isinstance(parts[2], _parser.SubPattern)
        size += max(1, inner) * (max(1, *counts) if is_repeat and counts else 1)
    return size


def _flat(parts: Any) -> Any:
    """The items of nested lists and tuples; an alternation keeps its branches in a list."""
    for part in parts:
        if isinstance(part, tuple | list):
            yield from _flat(part)
        else:
            yield part
