"""Bugs in what a base folder's config and tensors are held to. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug

# fmt: off
BASE_BUGS: tuple[Bug, ...] = ()
# fmt: on
