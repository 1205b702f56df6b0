"""Bugs in the model that the layer check before step 1 must see. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug

# fmt: off
LAYER_BUGS: tuple[Bug, ...] = ()
# fmt: on
