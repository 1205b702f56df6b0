"""Bugs in what reaches the text, and in what is learned of it. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug

# fmt: off
DATA_BUGS: tuple[Bug, ...] = ()
# fmt: on
