"""Bugs in reading adapters made elsewhere. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug

# fmt: off
ADAPTER_BUGS: tuple[Bug, ...] = ()
# fmt: on
