"""Compare what a server says that it has taken, and what it does with it, with what was sent."""

import math
from dataclasses import dataclass
from typing import Any

from megalora.json_text import parse_json
from megalora.serve.errors import ServerError
from megalora.serve.proof import RELATIVE, Proof

ROUNDING = 0.1
"""Root mean square error of log-probabilities that rounding to bfloat16 explains; 0.04 was measured
on a MoE model whose router flips."""
_ACKNOWLEDGED = ("label", "hash", "count", "bytes")
"""What a server repeats of a message's header."""


@dataclass(frozen=True)
class Timing:
    """Seconds of bringing one version to one server."""

    arrive_s: float
    """Until the server has all bytes and has checked them; it goes on decoding meanwhile."""
    load_s: float
    """Putting the adapter where the model reads it, for which decoding stops."""


def acknowledged(said: str, described: dict[str, Any], where: str) -> Timing:
    """The seconds in a server's answer to a load.

    Args:
        described: the header of the message that was sent.
        where: server and id, as messages begin.
    Raises:
        ServerError: it has taken something else.
    """
    expected = {key: described[key] for key in _ACKNOWLEDGED}
    try:
        taken = parse_json(said)
        found = {key: taken[key] for key in _ACKNOWLEDGED}
        timing = Timing(float(taken["arrive_s"]), float(taken["load_s"]))
    except (ValueError, KeyError, TypeError):
        raise ServerError(
            f"{where}: the server says {said[:200]!r}, and not what it took; has its vLLM this"
            " version of megalora's plug-in?"
        ) from None
    # Not the hash alone: the label says which version it is.
    if found != expected:
        raise ServerError(f"{where}: the server took {found}, and {expected} was sent")
    return timing


def agrees(proof: Proof) -> bool:
    """Whether a server does with an adapter what the training does.

    Unlike ``Proof.ok`` for adapters that may have no effect yet, as in the first steps of a
    training: what cannot be told from rounding agrees.
    """
    assert proof.trained is not None
    if proof.dtype == "float32":
        # Both sides compute the same sums: they agree to the last digits.
        return proof.error <= proof.atol
    # Root mean squares, so that a long text is not judged more strictly.
    root = math.sqrt(len(proof.trained))
    error = math.dist(proof.served, proof.trained) / root
    effect = math.dist(proof.trained, proof.base) / root
    return error <= max(RELATIVE * effect, ROUNDING)
