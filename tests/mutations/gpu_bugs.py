"""Bugs that only a GPU would meet: a tensor on the wrong device, a new wait of the host. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug

# fmt: off
GPU_BUGS: tuple[Bug, ...] = ()
# fmt: on
