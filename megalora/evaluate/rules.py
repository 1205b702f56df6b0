"""Say whether a generated answer is right: rules by name, patterns and functions. No torch."""

import importlib
import re
import sys
from collections.abc import Callable
from decimal import Decimal

Rule = Callable[[str, str], bool]
"""(answer, expected) -> whether the answer is right; ``ValueError`` where ``expected`` cannot be
judged by it."""

# A sign behind a digit, as in 10-3, is an operator; a currency may stand between it and the number.
# Commas belong to a number where they part thousands, so that 1,2 is two numbers.
_NUMBER = re.compile(
    r"((?<![\d)])[-+])?(?:\\?[$€£])?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
# As LaTeX parts thousands (1{,}000, 1\,000, 1,\!000), and the minus sign of Unicode.
_SPELLINGS = ((r"{,}", ","), (r"\!", ""), (r"\,", ""), ("\u2212", "-"))
_BOXED = "\\boxed{"
NAMES = "last-number, exact, regex:PATTERN, MODULE:FUNCTION"


def rule_of(text: str) -> Rule:
    r"""The rule that ``--rule`` names.

    last-number       the last number of both texts is the same (1,000 = 1000.0), as for GSM8K;
                      where there is a \boxed{}, the number in the last one
    exact             the texts are the same, but for space around them
    regex:PATTERN     its last match is the same in both: its first group, or all of it without one
    MODULE:FUNCTION   what the function says of (answer, expected)

    Raises:
        ValueError: none of these; the pattern is broken; there is no such function.
    """
    if text == "last-number":
        return _by(_last_number, "number")
    if text == "exact":
        return lambda answer, expected: answer.strip() == expected.strip()
    kind, colon, rest = text.partition(":")
    if kind == "regex" and rest:
        return _by(_last_match(rest), f"match of {rest!r}")
    if colon and kind and rest:
        return _function(kind, rest)
    raise ValueError(f"--rule {text}: not a rule; there are {NAMES}")


def _by[T](read: Callable[[str], T | None], what: str) -> Rule:
    """Compare what ``read`` finds in both texts."""

    def rule(answer: str, expected: str) -> bool:
        wanted = read(expected)
        if wanted is None:
            raise ValueError(f"the expected answer has no {what}: {expected[:80]!r}")
        return read(answer) == wanted

    return rule


def _last_number(text: str) -> Decimal | None:
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    # Whatever else is said, the box is the answer.
    boxed = _last_boxed(text)
    found = _NUMBER.findall(text if boxed is None else boxed)
    # The last number of \frac{1}{2} is no answer.
    if not found or (boxed is not None and len(found) > 1):
        return None
    sign, digits = found[-1]
    # Decimals compare by value: 12.50 is 12.5.
    return Decimal(sign + digits.replace(",", ""))


def _last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}``, with braces of its own; None without one."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    # Braces of LaTeX commands inside, such as \\text{}, are balanced.
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    # It was cut: nothing says that the number is whole.
    return ""


def _last_match(pattern: str) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--rule regex:{pattern}: not a regular expression ({error})") from None

    def read(text: str) -> str | None:
        last = None
        for match in compiled.finditer(text):
            last = match[1] if compiled.groups else match[0]
        return last

    return read


def _function(module: str, name: str) -> Rule:
    # A file beside the user's data is a module, too.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--rule {module}:{name}: {error}; there are {NAMES}") from None
    if not callable(found):
        raise ValueError(f"--rule {module}:{name} is not a function")

    def rule(answer: str, expected: str) -> bool:
        said = found(answer, expected)
        # A text or None would count as a yes or a no that nobody meant.
        if not isinstance(said, bool):
            raise ValueError(f"--rule {module}:{name} must return True or False, got {said!r}")
        return said

    return rule
