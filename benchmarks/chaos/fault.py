"""Record one injected fault and what became of the run."""

from dataclasses import dataclass

SURVIVED = "survived"
"""What was saved is found again bit for bit, or the run went on."""
REFUSED = "refused"
"""One line says what is wrong; nothing that is whole was given up for it."""
LOST = "lost"
"""A whole checkpoint is not found, a damaged one is taken for whole, or a traceback."""
HANG = "hang"
"""Nothing ended within the limit."""
RESULTS = (SURVIVED, REFUSED, LOST, HANG)


@dataclass(frozen=True)
class Fault:
    """One fault."""

    kind: str
    what: str
    """What was injected, and when."""
    result: str
    """One of ``RESULTS``."""
    seconds: float
    """From the fault to the result."""
    detail: str = ""
    """What the run said, or what was wrong."""
    left_over: tuple[str, ...] = ()
    """Files that a save has begun and nobody has removed."""
