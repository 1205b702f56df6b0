"""Read a server's answer: at most 64 MB, within a time, as it was sent.

A server may be another than the user thinks, or broken: httpx alone reads a body without end into
memory, inflates 4 MB of gzip to 4 GB, and waits for ever for one that sends a byte a second, since
its timeouts are for one read each.
"""

import time
from collections.abc import AsyncIterator, Iterator

import httpx

from megalora.serve.errors import ServerError, ServerUnreachable

LARGEST_BODY = 2**26
"""Limit in bytes, whole or streamed. Log-probabilities of a prompt of 100,000 tokens are 10 MB."""
AS_SENT = {"Accept-Encoding": "identity"}
"""Header of every request: nothing is to be inflated here."""


class _Meter:
    """Counts the bytes of one answer, and its seconds."""

    def __init__(self, response: httpx.Response, doing: str, within_s: float | None) -> None:
        self.doing = doing
        self.num_bytes = 0
        self.within_s = within_s
        self.started = time.monotonic()
        encoding = response.headers.get("content-encoding", "identity")
        # ``iter_raw`` inflates nothing: compressed bytes would pass for text.
        if encoding != "identity":
            raise ServerError(f"{doing}: the answer is compressed, which was not asked for")

    def count(self, piece: bytes) -> None:
        self.num_bytes += len(piece)
        if self.num_bytes > LARGEST_BODY:
            raise ServerError(
                f"{self.doing}: the answer has more than {LARGEST_BODY / 1e6:,.0f} MB; is it vLLM?"
            )
        if self.within_s is not None and time.monotonic() - self.started > self.within_s:
            raise ServerUnreachable(
                f"{self.doing}: the answer has not ended after {self.within_s:g} s; raise timeout,"
                " or see the server's log"
            )


def read_body(response: httpx.Response, doing: str, within_s: float | None = None) -> bytes:
    """The body of a streamed response.

    Args:
        doing: what the request does, as error messages begin.
        within_s: seconds from its first byte to its last; None for any.
    Raises:
        ServerError: it is too large, or compressed.
        ServerUnreachable: it takes longer.
    """
    meter = _Meter(response, doing, within_s)
    pieces = []
    for piece in response.iter_raw():
        meter.count(piece)
        pieces.append(piece)
    return b"".join(pieces)


def read_lines(response: httpx.Response, doing: str) -> Iterator[str]:
    """Lines of a streamed response; raises as ``read_body``."""
    meter = _Meter(response, doing, None)
    rest = b""
    for piece in response.iter_raw():
        meter.count(piece)
        # A piece may end inside a character, so that lines are split before they are decoded.
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")
    yield rest.decode(errors="replace")


async def pieces_of(response: httpx.Response, doing: str) -> AsyncIterator[bytes]:
    """Pieces of the body of an asynchronous response; raises as ``read_body``."""
    meter = _Meter(response, doing, None)
    async for piece in response.aiter_raw():
        meter.count(piece)
        yield piece
