"""Parse JSON that others wrote, within limits: the one place where text becomes Python objects.

    what                        limit
    size of a file              64 MB, and a regular file: opening a pipe would wait for ever
    depth                       100 lists and objects around a value
    keys                        each once in an object, since ``json`` would drop one of the values
    integers                    below 2**53 in absolute value  } both only where ``exact_numbers``
    NaN, Infinity and 1e999     refused                        }

Published config and tokenizer files hold numbers such as 10**30 in fields that nobody reads, and
rows of data hold ids. There, and where a message can name the key, the reader checks the numbers
that it takes. What a value's type must be, each reader checks: ``adapters/read/options.py`` has the
table of adapter_config.json, ``model/families/`` and ``model/quantised/config.py`` those of
config.json, ``adapters/training_state.py`` that of state.json.
"""

import json
import math
import stat
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalora.wording import typed

LARGEST_JSON = 2**26
"""Limit in bytes: Python's objects take many times the memory of their text. The index of a model
with 36,000 tensors has 3 MB."""
MAX_DEPTH = 100
"""Lists and objects around a value. Of what is read here, tool schemas nest deepest: some 20."""
MAX_INTEGER = 2**53
"""From here on float64, as which JSON's numbers are read elsewhere, skips integers."""


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float holds: JSON has larger integers, at which
    ``math.isfinite`` raises. True and False are none."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max


class NotJson(ValueError):
    """A text is not JSON within the limits; the message says why, and not where."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line
        """Line of the text at which parsing ended; None where that is not known."""


def parse_json(text: str | bytes, *, exact_numbers: bool = True) -> Any:
    """The value of a JSON text, of which bytes are UTF-8, with or without a byte order mark.

    Args:
        exact_numbers: whether every number must be finite, and every integer one that float64
            holds exactly.
    Raises:
        NotJson: it is not JSON, or exceeds a limit of this module.
    """
    decode = _EXACT if exact_numbers else _ANY_NUMBERS
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = decode(text)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg}, column {error.colno})"
        raise NotJson(reason, error.lineno) from None
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8 ({error.reason}, byte {error.start + 1})") from None
    except RecursionError:
        raise NotJson(_TOO_DEEP) from None
    # It is a ValueError, too, and must not be taken for the one below.
    except NotJson:
        raise
    except ValueError as error:
        # Python's limit on the digits of an integer.
        raise NotJson(f"holds a number of too many digits ({error})") from None
    # Most texts have fewer brackets than that, which takes no time to count.
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise NotJson(_TOO_DEEP)
    return value


def read_json(path: Path, *, exact_numbers: bool = True) -> Any:
    """The value in a JSON file; see ``parse_json``.

    Raises:
        ValueError: it is not a regular file or too large, or not JSON within the limits; the
            message names the file and, where it is known, the line.
        OSError: the file cannot be read, or is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if status.st_size > LARGEST_JSON:
        raise ValueError(
            f"{path}: {status.st_size / 1e6:,.0f} MB; megalora reads JSON files of up to"
            f" {LARGEST_JSON / 1e6:,.0f} MB"
        )
    try:
        return parse_json(path.read_bytes(), exact_numbers=exact_numbers)
    except NotJson as error:
        line = f":{error.line}" if error.line else ""
        raise ValueError(f"{path}{line}: {error}") from None


_TOO_DEEP = f"lists or objects are nested more than {MAX_DEPTH} deep"


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether some value stands inside more than ``depth`` lists and objects."""
    # Level by level, so that no recursion is needed.
    level = [value]
    for _ in range(depth):
        inside: list[Any] = []
        for node in level:
            if type(node) is dict:
                inside.extend(node.values())
            elif type(node) is list:
                inside.extend(node)
        if not inside:
            return False
        level = inside
    return any(type(node) in (dict, list) for node in level)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these keys and values; raises ``NotJson`` where a key occurs twice."""
    # Every object of every file comes by: keys are counted only where one was lost.
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        ((key, _),) = counts.most_common(1)
        raise NotJson(f"a key occurs twice in an object: {typed(key)}; keep one")
    return found


def _integer(digits: str) -> int:
    number = int(digits)
    if abs(number) >= MAX_INTEGER:
        # Up to 4,300 digits pass Python's own limit, too many for a message.
        shown = digits if len(digits) <= 40 else f"{digits[:40]}..."
        raise NotJson(f"holds the integer {shown}, which is too large")
    return number


def _number(digits: str) -> float:
    # Of 1e999 this is inf, without an error.
    number = float(digits)
    if math.isinf(number):
        raise NotJson(f"holds the number {digits[:40]}, which is too large")
    return number


def _constant(name: str) -> float:
    raise NotJson(f"holds {name}, which is not a number of JSON")


# Made once: json.loads would make a decoder for every text.
_ANY_NUMBERS: Callable[[str], Any] = json.JSONDecoder(object_pairs_hook=_unique_keys).decode
_EXACT: Callable[[str], Any] = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_int=_integer, parse_float=_number,
    parse_constant=_constant,
).decode  # fmt: skip
