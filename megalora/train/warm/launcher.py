"""Become the launcher of a run whose ranks are forked: import all that they need, and lead them."""

import gc
import os
import sys

from megalora.train.warm.node import NodeParent
from megalora.train.warm.parent import Parent
from megalora.train.warm.restore import InMemory
from megalora.train.warm.together import Together


def prepare() -> None:
    """Import all that ranks need, so that they need not, and nothing that starts threads."""
    # With this, asking whether there is a GPU does not begin to use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from megalora import host

    host.install()
    import megalora.train.loop  # noqa: F401

    gc.collect()
    # Collecting what was imported would copy its pages into every rank.
    gc.freeze()


def train_warm(
    arguments: list[str], num_ranks: int, max_restarts: int, together: Together | None = None
) -> None:
    """Train as ``CONFIG.yaml [section.key=value ...]`` says, on ranks that are forked here.

    Args:
        together: how to find the other nodes; None where this one is alone.
    Raises:
        SystemExit: always, with the exit code.
    """
    if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        raise ValueError("checkpoint.snapshots needs Linux 5.3 or later; leave it out")
    prepare()
    from megalora.train.__main__ import begin
    from megalora.train.on_ranks import on_ranks

    def work(given: InMemory) -> None:
        on_ranks(arguments, "megalora.train", begin, given)

    if together is None:
        parent = Parent(work, num_ranks, max_restarts)
    else:
        parent = NodeParent(work, num_ranks, max_restarts, together)
    sys.exit(parent.run())
