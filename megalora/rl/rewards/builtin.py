"""Rewards by name, which compare a completion with the expected answer. No torch."""

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

from megalora.evaluate.rules import rule_of

Judge = Callable[[str, str, str, dict[str, Any]], Any]
"""(what was asked, completion, expected answer, row) -> float, bool or None."""

NAMES = "last-number, exact, regex:PATTERN, matches:PATTERN, math-verify"
QUICK = ("last-number", "exact")
"""Rewards that take microseconds whatever a model writes: they need no process of their own."""


def builtin(path: str) -> Judge | None:
    """The reward of this name; None where it is none of these.

    last-number       the last number of both texts is the same; see ``evaluate.rules``
    exact             the texts are the same, but for space around them
    regex:PATTERN     its last match is the same in both: its first group, or all of it without one
    matches:PATTERN   the pattern is found in the completion, whatever the answer is
    math-verify       both are the same expression, as math-verify reads them

    Raises:
        ValueError: a broken pattern, or math-verify is not installed.
    """
    kind, _, pattern = path.partition(":")
    if path in QUICK or kind == "regex":
        # The rules that ``megalora eval --rule`` has.
        rule = rule_of(path)
        return lambda asked, completion, expected, row: rule(completion, expected)
    if kind == "matches":
        return _matches(path, pattern)
    if path == "math-verify":
        # Importing it takes seconds, which only its processes need to spend.
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("math-verify is not installed: pip install 'megalora[math]'")
        return _math_verify
    return None


def _matches(path: str, pattern: str) -> Judge:
    try:
        # What stands between two marks may have several lines.
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{path}: not a regular expression ({error})") from None
    if not pattern:
        raise ValueError(f"{path}: needs a pattern, as in matches:<answer>.+</answer>")
    return lambda asked, completion, expected, row: compiled.search(completion) is not None


def _math_verify(asked: str, completion: str, expected: str, row: dict[str, Any]) -> bool:
    import math_verify  # type: ignore[import-not-found]

    wanted = _expression(expected)
    # Its own time-outs, by SIGALRM, and errors count as an answer that is not right: a policy may
    # write what no one can compute. They need the main thread of a process.
    return bool(math_verify.verify(wanted, math_verify.parse(completion)))


@functools.lru_cache(maxsize=1024)
def _expression(expected: str) -> Any:
    """The expected answer as math-verify reads it; every completion of a group asks for it."""
    import math_verify  # type: ignore[import-not-found]

    # As in GSM8K, the answer stands behind the reasons for it.
    answer = expected.rpartition("####")[2].strip()
    is_marked = "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer
    # LaTeX is only looked for between its marks, and an answer often is LaTeX without any.
    # A list of what it could be, the empty one where it is nothing.
    found = math_verify.parse(answer if is_marked else f"\\boxed{{{answer}}}")
    if not found:
        raise ValueError(f"math-verify finds nothing in the expected answer: {expected[:80]!r}")
    return found
