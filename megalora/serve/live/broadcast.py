"""Send a message to all servers at once, over gloo."""

import socket
import threading
from collections.abc import Callable

from megalora.serve.live.message import Message
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.broadcast import SENDER, Group

TIMEOUT_S = 60.0
"""Seconds after which a server that takes no part counts as gone."""


class Sender:
    """The training's end of the group, made when it is first needed, and anew after a failure."""

    def __init__(self, host: str, http_port: int, num_servers: int) -> None:
        """``http_port``: where servers ask again for what was broadcast."""
        self.host = host
        self.http_port = http_port
        self.size = num_servers + 1
        self.epoch = 0
        self.port = 0
        self._group: Group | None = None

    def open(self) -> None:
        """Choose the port of an epoch, before servers are told it."""
        if self._group is None:
            # Servers join the group of an epoch once, and keep it.
            self.epoch += 1
            with socket.socket() as probe:
                # A port that is free now; the store opens it when the first message is sent.
                probe.bind(("", 0))
                self.port = probe.getsockname()[1]

    def address_of(self, ident: str, server: int) -> str:
        """What the server with this number is asked to load."""
        query = f"http={self.http_port}&epoch={self.epoch}&rank={server + 1}&size={self.size}"
        return f"group://{self.host}:{self.port}/{ident}?{query}&timeout={TIMEOUT_S}"

    def send(self, message: Message) -> None:
        """Broadcast to servers that have been told to load it. Raises ``RuntimeError`` where one
        takes no part in time; the next message begins a new epoch."""
        try:
            if self._group is None:
                self._group = Group(self.host, self.port, self.epoch, SENDER, self.size, TIMEOUT_S)
            self._group.send(message.header, message.buffer)
        except BaseException:
            # Members of a group that has failed wait for what never comes: it is not used again.
            self._group = None
            raise


def in_background(send: Callable[[], None]) -> Callable[[], str | None]:
    """Begin to send; returns what waits for the end, and returns the failure's reason or None."""
    failed: list[str] = []

    def work() -> None:
        try:
            send()
        except RuntimeError as error:
            # Of torch's message the rest is its stack of C++ frames.
            failed.append(str(error).splitlines()[0])

    thread = threading.Thread(target=work, name="broadcast", daemon=True)
    thread.start()

    def wait() -> str | None:
        thread.join()
        return failed[0] if failed else None

    return wait
