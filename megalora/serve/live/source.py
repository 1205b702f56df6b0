"""Give the servers the messages of a training, from its memory, over HTTP."""

import hmac
import http.server
import threading
from typing import Any

from megalora.serve.live.address import LOOPBACK, TOKEN, TRAINER, check_address
from megalora.serve.live.message import Message

_PATH = "/adapters/"


class Source:
    """Messages by id, and the HTTP server that has them."""

    def __init__(self, address: str, token: str | None) -> None:
        """Listen.

        Args:
            address: ``http://HOST:PORT`` as servers reach it; without a port, a free one.
            token: what servers must show; None only where nobody else reaches the address.
        Raises:
            ValueError: nothing can listen there, or the address needs a token.
        """
        host, port = check_address(address, TRAINER)
        local = host in LOOPBACK
        if not local and not token:
            raise ValueError(
                f"whoever reaches {address} could take the adapters: set {TOKEN} to the same secret"
                " for the training and its servers"
            )
        self.messages: dict[str, Message] = {}
        self._token = token
        # Other machines may know this one by a name that is no interface's.
        listen = host if local else ""
        try:
            self._http = _Listener((listen, port or 0), self)
        except OSError as error:
            raise ValueError(f"the training cannot listen at {address}: {error}") from None
        self.host = host
        self.port = self._http.server_address[1]
        self.url = f"http://{host}:{self.port}"
        # A daemon, which cannot keep the process from ending.
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=[0.1], name="adapters", daemon=True
        )
        self._thread.start()

    def address_of(self, ident: str) -> str:
        return f"{self.url}{_PATH}{ident}"

    def admits(self, authorization: str | None) -> bool:
        """Whether a request with this header may have adapters."""
        if not self._token:
            return True
        # In a time that says nothing of where they differ.
        return hmac.compare_digest((authorization or "").encode(), f"Bearer {self._token}".encode())

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], source: Source) -> None:
        self.source = source
        super().__init__(address, _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Listener
    # Seconds that a server may take no bytes; its transfer is then over.
    timeout = 60.0

    def do_GET(self) -> None:
        source = self.server.source
        if not source.admits(self.headers.get("Authorization")):
            # Whether the adapter exists is said to servers alone.
            self.send_error(401)
            return
        # The reference keeps a message alive that is dropped while it is being sent.
        message = source.messages.get(self.path.removeprefix(_PATH))
        if message is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(message.num_bytes))
        self.end_headers()
        # Straight from the tensors' memory, without a copy.
        for part in (message.header, message.buffer):
            self.wfile.write(memoryview(part.numpy()))

    def log_message(self, format: str, *args: Any) -> None:
        pass
