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
"""Largest length of an expression with every counted repetition written out, as ``regex`` does."""
TOTAL_SECONDS = 20.0
"""Processor time for all matches of one expression. A model of 235B has 36,000 linears of
experts."""
_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT, _parser.POSSESSIVE_REPEAT)
# An opening brace that begins neither {2}, {2,}, {2,3} nor {,3}
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
                # re warns of syntax that may change.
                warnings.simplefilter("ignore")
                # re decides what is an expression: the same as for PEFT.
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
        # Processor time, so that a busy machine condemns nothing.
        start = time.process_time()
        try:
            found = match(name, timeout=SECONDS)
        except TimeoutError:
            found = None
            # One match of half a second condemns the expression: a sound one takes microseconds.
            self.spent_s = TOTAL_SECONDS
        self.spent_s += time.process_time() - start
        if self.spent_s >= TOTAL_SECONDS:
            raise ValueError(
                f"{self.where}: {self.said} takes too long to match names such as {name}, in PEFT"
                " too. Repetition within repetition does that; write the names out, or write the"
                " expression without it."
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
    Python's parser returns it: (operation, argument) pairs."""
    size = 0
    for operation, argument in parsed:
        parts = argument if isinstance(argument, tuple | list) else (argument,)
        inner = 0
        for part in _flat(parts):
            if isinstance(part, _parser.SubPattern):
                inner += _expanded(part)
        times = 1
        if operation in _REPEATS:
            least, most, _ = argument
            # x{3,} has no upper count; ``regex`` writes out the three that must be there.
            times = max(1, least if most == _parser.MAXREPEAT else most)
        size += max(1, inner) * times
    return size


def _flat(parts: Any) -> Any:
    """The items of nested lists and tuples; an alternation keeps its branches in a list."""
    for part in parts:
        if isinstance(part, tuple | list):
            yield from _flat(part)
        else:
            yield part
