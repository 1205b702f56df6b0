"""Say how the parents of several nodes find each other, and read the token by which they know each
other."""

import os
from dataclasses import dataclass, field
from typing import Any

TOKEN = "MEGALORA_TOKEN"
"""Environment variable of the token: arguments are seen by all users of a machine."""
LEAST_TOKEN = 16
"""Characters of a token."""


@dataclass(frozen=True)
class Together:
    """What all nodes of a run are started with."""

    num_nodes: int
    host: str
    """Where the meeting is held: a name or an address of one of them."""
    port: int
    token: bytes = field(repr=False)
    wait_s: float
    """Seconds that nodes wait for each other, at the start and for the place of a lost one."""
    replicate: int
    """Number of steps between replicas (``checkpoint.snapshots.replicate``)."""
    started: dict[str, Any]
    """Options, arguments and versions, which must be the same on all nodes."""


def meeting_place(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; raises ``ValueError`` for another text."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--meet {text!r} is not HOST:PORT: give the name of one of the nodes, as the others"
            " reach it, and a free port there, such as node-a:29400"
        )
    return host, int(port)


def take_token() -> bytes:
    """The run's token; ranks do not inherit it. Raises ``ValueError`` where there is none."""
    token = os.environ.pop(TOKEN, "")
    if len(token) < LEAST_TOKEN:
        what = f"has {len(token)} characters" if token else "is not set"
        raise ValueError(
            f"{TOKEN} {what}: nodes know each other by it. Set it to the same {LEAST_TOKEN}"
            " characters or more on every node, such as those of openssl rand -hex 16"
        )
    return token.encode()
