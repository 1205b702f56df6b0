"""What every refusal of a hostile input must be."""

import time
from collections.abc import Callable
from typing import Any


def refused(action: Callable[[], Any], kind: type[ValueError] = ValueError) -> str:
    """The one line with which ``action`` refuses its input, within a second of processor time."""
    start = time.process_time()
    try:
        action()
    except kind as error:
        said = str(error)
    else:
        raise AssertionError("it was accepted")
    assert time.process_time() - start < 1
    assert said and "\n" not in said and "\x1b" not in said and len(said) < 1000, said
    return said
