"""Exchange messages and files with another node over TCP, once both have shown that they know the
run's token.

    server                              client
    {"nonce": N}                   ->
                                   <-   {"nonce": M, "proof": HMAC(token, "client" N M)}
    {"proof": HMAC(token, "server" N M)}   ->

The token itself never travels. What follows is neither encrypted nor signed: the network between
the nodes must be trusted, as NCCL and gloo need it, too. Every length is compared with a limit
before memory is taken for it, and files are compared with their SHA-256 by who asks for them.
"""

import contextlib
import hashlib
import hmac
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import IO, Any

from megalora.json_text import NotJson, parse_json
from megalora.train.warm.processes import readable
from megalora.wording import shorten

LENGTH = struct.Struct("!I")
MESSAGE_BYTES = 1 << 24
"""Limit of a message: options of a run, steps of each rank, addresses of nodes."""
GREETING_BYTES = 1 << 10
"""Limit of a message of somebody who has not shown the token yet."""
GREETING_S = 10.0
"""Seconds that he may take to show it."""
PART_BYTES = 1 << 22
"""Bytes of a file that are received at once."""
SILENT_S = 30.0
"""Seconds without a byte after which a link that is in use is given up."""
PROBE_S = 2
PROBES = 4
"""A host that answers none of so many probes of the system, one every two seconds, is lost."""


class LinkLost(OSError):
    """The other side is gone, or says what it must not."""


class Link:
    """One connection; not for several threads at once, except that one may send while another
    receives."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(SILENT_S)
        # Messages are short and waited for: none is held back to be sent with the next.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that has lost its power or its cable closes no connection.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
        # Probes are not sent while something that was sent is not acknowledged.
        silent_ms = 1000 * PROBE_S * (1 + PROBES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silent_ms)

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def own_host(self) -> str:
        """Address of this side, by which the other one reaches it."""
        return str(self.socket.getsockname()[0])

    def close(self) -> None:
        """End the connection, also where forked processes have it open."""
        # The other side may have ended it before.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether something comes within the time, the end of the link included."""
        return bool(readable([self.fileno()], timeout_s))

    def send(self, **message: Any) -> None:
        """Send a message; raises ``OSError`` where nobody takes it."""
        text = json.dumps(message).encode()
        assert len(text) <= MESSAGE_BYTES, (message.get("kind"), len(text))
        # Together, so that a message is one packet where it fits.
        self.socket.sendall(LENGTH.pack(len(text)) + text)

    def receive(self, limit: int = MESSAGE_BYTES) -> dict[str, Any]:
        """The next message. Raises ``OSError`` where none comes, and where it is none of ours."""
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if length > limit:
            raise LinkLost(f"a message of {length:,} bytes was announced; the limit is {limit:,}")
        try:
            # Within its own limits of depth and numbers.
            message = parse_json(self._exactly(length))
        except NotJson as error:
            raise LinkLost(f"a message is {error}") from None
        if not isinstance(message, dict):
            raise LinkLost(f"a message is {shorten(message)}")
        return message

    def send_file(self, descriptor: int, num_bytes: int) -> None:
        """Send the beginning of a file, which the system reads by itself."""
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            # From a place of its own: forked processes share the one of the descriptor.
            sent = self.socket.sendfile(file, 0, num_bytes)
        if sent != num_bytes:
            raise LinkLost(f"a file of {num_bytes:,} bytes ends behind {sent:,}")

    def receive_file(self, file: IO[bytes], num_bytes: int) -> tuple[int, str]:
        """Write what ``send_file`` sends; returns its bytes and their SHA-256."""
        digest = hashlib.sha256()
        # One buffer for all parts, whatever was announced.
        buffer = memoryview(bytearray(min(PART_BYTES, num_bytes)))
        left = num_bytes
        while left:
            count = self.socket.recv_into(buffer[: min(left, len(buffer))])
            if not count:
                raise LinkLost(f"the other side has closed the link {left:,} bytes too early")
            part = buffer[:count]
            # Releases the interpreter, so that ranks' files are received side by side.
            digest.update(part)
            left -= count
            # A file without a buffer of its own may take a part only.
            while part:
                part = part[file.write(part) :]
        return num_bytes, digest.hexdigest()

    def _exactly(self, length: int) -> bytes:
        parts: list[bytes] = []
        left = length
        while left:
            part = self.socket.recv(min(left, PART_BYTES))
            if not part:
                raise LinkLost("the other side has closed the link")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def accepted(connection: socket.socket, token: bytes) -> Link:
    """The server's side of a connection; raises ``LinkLost`` for a client without the token."""
    link = Link(connection)
    connection.settimeout(GREETING_S)
    # Drawn anew, so that no earlier proof fits.
    nonce = os.urandom(32).hex()
    link.send(nonce=nonce)
    answer = link.receive(GREETING_BYTES)
    asked = str(answer.get("nonce"))
    if not _is_proof(answer, token, "client", nonce, asked):
        raise LinkLost("a client does not know the run's token")
    link.send(proof=_proof(token, "server", nonce, asked))
    connection.settimeout(SILENT_S)
    return link


def connected(host: str, port: int, token: bytes, timeout_s: float = GREETING_S) -> Link:
    """The client's side; raises ``OSError`` where nobody listens, and ``LinkLost`` where it is one
    without the token."""
    link = Link(socket.create_connection((host, port), timeout=timeout_s))
    try:
        link.socket.settimeout(GREETING_S)
        # Closed before it has asked anything: who is turned away for that may come again.
        if not link.socket.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("it has no time for more connections")
        nonce = str(link.receive(GREETING_BYTES).get("nonce"))
        asked = os.urandom(32).hex()
        link.send(nonce=asked, proof=_proof(token, "client", nonce, asked))
        if not _is_proof(link.receive(GREETING_BYTES), token, "server", nonce, asked):
            raise LinkLost("it does not know the run's token")
    except BaseException:
        link.close()
        raise
    link.socket.settimeout(SILENT_S)
    return link


def connected_within(
    host: str, port: int, token: bytes, wait_s: float, stopped: Callable[[], bool]
) -> Link | None:
    """``connected``, as soon as somebody listens there; None once ``stopped`` says so.

    Raises:
        ValueError: nobody does in time, or it is one without the token.
    """
    deadline_s = time.monotonic() + wait_s
    while not stopped():
        try:
            return connected(host, port, token, timeout_s=min(GREETING_S, wait_s))
        except LinkLost as error:
            # Whoever closes the link in the middle of the greeting has found our proof wrong.
            raise ValueError(
                f"{host}:{port} refuses this node ({error}): give all nodes the same token"
            ) from None
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise ValueError(
                    f"no node answers at {host}:{port} within {wait_s:g} s"
                    f" ({error.strerror or error}); is the command started on that host, the name"
                    " right and the port open?"
                ) from None
        time.sleep(0.1)
    return None


def _proof(token: bytes, side: str, nonce: str, asked: str) -> str:
    # The side is in it: else a proof could be sent back as the other side's.
    return hmac.new(token, f"{side} {nonce} {asked}".encode(), hashlib.sha256).hexdigest()


def _is_proof(answer: dict[str, Any], token: bytes, side: str, nonce: str, asked: str) -> bool:
    # Bytes, because texts of others may have letters that are compared in a time of their own.
    given = str(answer.get("proof")).encode()
    return hmac.compare_digest(given, _proof(token, side, nonce, asked).encode())
