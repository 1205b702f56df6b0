"""Bugs in run folders, checkpoints, identities and restarts. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug

# fmt: off
RUN_BUGS: tuple[Bug, ...] = ()
# fmt: on
