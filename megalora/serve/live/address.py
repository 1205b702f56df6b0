"""Say where a training can be reached by its servers. Needs no torch."""

import os
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

TRAINER = "MEGALORA_TRAINER"
"""Environment variable with the training's address, ``http://HOST:PORT``, the same for a training
and its servers. The port may be left out for the servers, which then take any of the host."""
TOKEN = "MEGALORA_TRAINER_TOKEN"
"""Environment variable with the secret of a training and its servers."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_address(address: str, option: str) -> tuple[str, int | None]:
    """Host and port of ``http://HOST:PORT``; raises ``ValueError`` for anything else, such as a
    path behind it."""
    url = urlsplit(address)
    rest = url.path.strip("/") or url.query or url.fragment
    try:
        port = url.port
    except ValueError:
        port = -1
    if url.scheme != "http" or not url.hostname or rest or port == -1:
        raise ValueError(
            f"{option}={address} is not the address of a training; write it as http://HOST:PORT"
        )
    return url.hostname, port


def own_address(servers: Sequence[str]) -> str:
    """The address at which servers reach this machine: $MEGALORA_TRAINER, or that of the interface
    which leads to the first of them."""
    named = os.environ.get(TRAINER)
    if named:
        return named
    hosts = [urlsplit(server).hostname or "" for server in servers]
    elsewhere = [host for host in hosts if host not in LOOPBACK]
    if not elsewhere:
        return "http://127.0.0.1"
    # Connecting a datagram socket sends nothing; it chooses an interface.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((elsewhere[0], 9))
        except OSError as error:
            if error.errno in (socket.EAI_NONAME, socket.EAI_AGAIN):
                raise ValueError(
                    f"no host is known by the name {elsewhere[0]} ({error.strerror}); correct the"
                    " server's URL"
                ) from None
            raise ValueError(
                f"no way to {elsewhere[0]} ({error}); set {TRAINER} to this training's address,"
                " http://HOST:PORT"
            ) from None
        return f"http://{probe.getsockname()[0]}"
