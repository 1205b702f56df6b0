"""Servers, and versions of the adapter that they have, as a training knows them."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalora.serve.errors import AdapterNotFound
from megalora.serve.live.checks import Timing
from megalora.serve.live.message import Message
from megalora.serve.vllm import Client

LOAD_TIMEOUT_S = 600.0


@dataclass(eq=False)
class Version:
    """A version that the servers are to have."""

    number: int
    id: str
    message: Message
    tensors: Mapping[str, Tensor]
    probe: dict[str, Any] | None


class Server:
    """One server as the publisher knows it."""

    def __init__(self, url: str, number: int, api_key: str | None) -> None:
        self.url = url
        self.number = number
        self.client = Client(url, timeout=LOAD_TIMEOUT_S, api_key=api_key)
        # Held while its versions change.
        self.lock = threading.RLock()
        self.current: Version | None = None
        self.before: Version | None = None
        """In service before ``current`` came, which may be withdrawn."""
        # A version that came by a folder has none.
        self.timing: Timing | None = None
        """Of what was loaded last over the network."""

    def ids(self, name: str) -> list[str]:
        """Ids of NAME's versions there, in the order of loading."""
        return [served.id for served in self.client.api.models() if served.name == name]

    def unload(self, ident: str) -> None:
        # A server that was started again does not have it.
        with suppress(AdapterNotFound):
            self.client.api.unload_adapter(ident)
