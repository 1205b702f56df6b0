"""Bring every version of an adapter that is being trained to several vLLM servers, and keep them at
the same versions.

Ids are NAME@vN.HASH: never two contents under one id, since vLLM's prefix cache knows an adapter by
name and path alone. A version is in service on a server when the server has answered what it took
(label, hash, number of tensors) and, where a probe was given, has repeated the training's
log-probabilities of it.

    http    each server fetches the message from the training's memory
    group   one broadcast to all servers, where all of them lack the same version; otherwise http
    folder  a folder that training and servers see under one path, read by vLLM itself
    auto    http, and folder where a server takes no adapters by network and there is a folder
"""

import os
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megalora.serve.adapter_names import check_name
from megalora.serve.errors import (
    AdapterNameTaken,
    ServeError,
    ServerError,
    ServerUnreachable,
    TrainerRefused,
)
from megalora.serve.live.address import TOKEN, own_address
from megalora.serve.live.broadcast import Sender, in_background
from megalora.serve.live.checks import Timing, acknowledged, agrees
from megalora.serve.live.folder import AdapterFolders
from megalora.serve.live.message import Form, build_message
from megalora.serve.live.servers import Server, Version
from megalora.serve.live.source import Source
from megalora.serve.proof import prove_probe
from megalora.serve.vllm import Client
from megalora.thread_work import in_thread

Transport = Literal["auto", "http", "group", "folder"]
KEEP = 3
"""Versions in service: the newest, and those with which requests may have begun."""


class Publisher:
    """Keeps servers at the versions of one adapter. Its methods may be called from any thread.

    Creating one begins to listen; no server is asked yet.

    Args:
        servers: URLs, such as ``http://127.0.0.1:8000``.
        name: NAME, which requests may give for the newest version.
        form: how experts are sent, see ``message.py``.
        folder: for the transports ``folder`` and ``auto``; seen by the servers under the same
            path.
        keep: number of versions in service. The servers need as many slots and one more
            (``--max-loras``) for requests of all of them to run at once.
        address: this training's, ``http://HOST:PORT`` as servers reach it; None for
            $MEGALORA_TRAINER, or the interface that leads to them.
        token: secret that servers show; None for $MEGALORA_TRAINER_TOKEN.
        dtype: dtype in which to send, see ``build_message``.
        served_dtype: dtype that the servers compute in.
        atol: largest error of a log-probability of the probe in float32.
        in_use: returns numbers of versions that must stay although newer ones are there, such
            as those of requests under way.
        examine: called with a server that is new or was started again, and the id of its newest
            version, before that is in service; raises ``ServerError`` for one that does not fit.
    Raises:
        ValueError: a wrong name, address or combination.
    """

    def __init__(
        self,
        servers: Sequence[str],
        name: str,
        *,
        transport: Transport = "auto",
        form: Form = "packed",
        folder: Path | None = None,
        keep: int = KEEP,
        address: str | None = None,
        token: str | None = None,
        api_key: str | None = None,
        dtype: torch.dtype | None = None,
        served_dtype: str = "float32",
        atol: float = 1e-4,
        in_use: Callable[[], Container[int]] = tuple,
        examine: Callable[[Client, str], None] | None = None,
    ) -> None:
        check_name("name", name)
        # What is wrong is said before anything listens.
        if transport == "folder" and folder is None:
            raise ValueError("the transport 'folder' needs a folder that the servers see")
        if len(set(servers)) < len(servers) or not servers:
            raise ValueError(f"servers={list(servers)} must be different URLs, at least one")
        self.name = name
        self.transport = transport
        self.form: Form = form
        self.keep = keep
        self.dtype = dtype
        self.served_dtype = served_dtype
        self.atol = atol
        self.in_use = in_use
        self.examine = examine
        self.servers = [Server(url.rstrip("/"), i, api_key) for i, url in enumerate(servers)]
        self.folders = AdapterFolders(folder) if folder else None
        token = token or os.environ.get(TOKEN)
        self.source = Source(address or own_address(servers), token)
        self._sender = Sender(self.source.host, self.source.port, len(servers))
        # In the order of publishing.
        self._versions: dict[str, Version] = {}
        self._publishing = threading.Lock()

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(
        self,
        version: int,
        tensors: Mapping[str, Tensor],
        config: dict[str, Any],
        probe: dict[str, Any] | None = None,
        label: str | None = None,
    ) -> str:
        """Bring a version to all servers; returns its id when it is in service on all of them.

        Publishing the same contents again is harmless, and is what to do after an error.

        Args:
            version: its number.
            tensors, config: as ``adapter_contents`` gives them. The tensors must stay as they are
                while the version is kept, if there is a folder.
            probe: as ``probe.json``: ``tokens`` and the training's ``logprobs`` of them by this
                version, with their ``dtype``. None proves nothing.
            label: stands for ``vN`` in the id.
        Raises:
            ServerUnreachable: a server does not answer; the others have the version.
            ServerError: a server does not do with it what the training does, or says that it has
                taken something else.
            TrainerRefused: a server takes no adapters from this training.
            AdapterError: the adapter does not fit a server.
        """
        with self._publishing:
            message = build_message(label or f"v{version}", tensors, config, self.form, self.dtype)
            ident = message.id_of(self.name)
            # Going back to an older version makes it the newest.
            self._versions.pop(ident, None)
            # Of use for folders alone; the message has them too.
            kept = tensors if self.folders else {}
            self._versions[ident] = Version(version, ident, message, kept, probe)
            self.source.messages[ident] = message
            try:
                self._bring_to_all(ident)
            except ServerUnreachable:
                # It gets the version when it is back.
                raise
            except BaseException:
                self._withdraw(ident)
                raise
            self._retire()
            return ident

    def current(self, server: str) -> int | None:
        """Number of the newest version in service on a server; None before the first."""
        found = self._server(server).current
        return None if found is None else found.number

    def id_of(self, version: int) -> str:
        """Id of a version that is kept. Raises ``KeyError``."""
        for kept in reversed(self._versions.values()):
            if kept.number == version:
                return kept.id
        raise KeyError(version)

    def restore(self, server: str) -> None:
        """Bring to a server what it lacks of the versions that are kept, under the ids that they
        have, and prove the newest: after it was started again. Raises as ``publish`` does."""
        self._bring(self._server(server))

    def timings(self) -> dict[str, Timing | None]:
        """Seconds of the last version that was loaded over the network, by server."""
        return {server.url: server.timing for server in self.servers}

    def close(self) -> None:
        """Stop listening. Servers keep what they have."""
        # A server that hangs is not waited for: whoever has asked it ends with the process.
        self.source.close()
        for server in self.servers:
            server.client.close()

    def _server(self, url: str) -> Server:
        for server in self.servers:
            if server.url == url.rstrip("/"):
                return server
        raise ValueError(f"{url} is not one of the servers of {self.name}")

    def _bring_to_all(self, ident: str) -> None:
        waiting = None
        path_of = None
        if self.transport == "group" and self._all_lack(ident):
            # Servers are told the port before anybody listens there; joining waits.
            self._sender.open()
            message = self._versions[ident].message
            path_of = lambda server: self._sender.address_of(ident, server.number)  # noqa: E731
            waiting = in_background(lambda: self._sender.send(message))
        errors = self._bring_each(path_of)
        failure = waiting() if waiting else None
        # A failed broadcast is no failed version: the servers ask for it one by one.
        if failure is not None and errors:
            errors = self._bring_each()
        if errors:
            # What the caller can wait for comes last.
            errors.sort(key=lambda error: isinstance(error, ServerUnreachable))
            raise errors[0]

    def _bring_each(self, path_of: Callable[[Server], str] | None = None) -> list[BaseException]:
        """Bring all servers what they lack, at once; returns what went wrong."""
        under_way = []
        for server in self.servers:
            under_way.append(in_thread(partial(self._bring, server, path_of), "publish"))
        errors: list[BaseException] = []
        for brought in under_way:
            # Every server is waited for, so that none is changed behind the caller's back.
            error = brought.exception()
            if error is not None:
                errors.append(error)
        return errors

    def _all_lack(self, ident: str) -> bool:
        """Whether every server answers and lacks this version alone."""
        kept = [*self._versions]
        for server in self.servers:
            lacking = set(kept) - set(server.ids(self.name))
            if lacking != {ident}:
                return False
        return True

    def _bring(self, server: Server, path_of: Callable[[Server], str] | None = None) -> None:
        """Load what the server lacks, the oldest first, so that NAME means the newest."""
        with server.lock:
            versions = list(self._versions.values())
            newest = versions[-1]
            loaded = server.ids(self.name)
            # An older version that is the newest again: only loading makes it that.
            if newest.id in loaded[:-1]:
                server.unload(newest.id)
                loaded.remove(newest.id)
            # One that is missing before those that are there is not worth changing NAME for.
            missing: list[Version] = []
            for version in versions:
                missing.append(version)
                if version.id in loaded:
                    missing.clear()
            # A server that was started again has nothing.
            if server.current is not None and server.current.id not in loaded:
                server.current = None
            for version in missing:
                self._load(server, version, path_of)
            if server.current is not newest:
                # Loaded is not in service: what it computes is compared first.
                if newest.probe is not None:
                    self._prove(server, newest)
                if server.current is None and self.examine is not None:
                    self.examine(server.client, newest.id)
                server.before = server.current
                server.current = newest

    def _load(
        self, server: Server, version: Version, path_of: Callable[[Server], str] | None
    ) -> None:
        if self.transport == "folder":
            self._load_folder(server, version)
            return
        path = path_of(server) if path_of else self.source.address_of(version.id)
        # The server answers when all its workers have loaded it.
        try:
            said = server.client.api.load_adapter(version.id, path)
        except TrainerRefused:
            if self.transport != "auto" or self.folders is None:
                raise
            # For good: the server would refuse the next as well.
            self.transport = "folder"
            self._load_folder(server, version)
            return
        except AdapterNameTaken:
            # By a load whose answer was lost; the id has the contents' hash.
            return
        where = f"{server.url}: {version.id}"
        server.timing = acknowledged(said, version.message.described, where)

    def _load_folder(self, server: Server, version: Version) -> None:
        assert self.folders is not None
        config = version.message.described["config"]
        place = self.folders.write(version.id, version.tensors, config, server.ids(self.name))
        with suppress(AdapterNameTaken):
            server.client.api.load_adapter(version.id, str(place))

    def _prove(self, server: Server, version: Version) -> None:
        assert version.probe is not None
        proof = prove_probe(
            server.client, version.id, version.probe,
            served_dtype=self.served_dtype, atol=self.atol,
        )  # fmt: skip
        if not agrees(proof):
            raise ServerError(f"{server.url}: {proof.text()}")

    def _withdraw(self, ident: str) -> None:
        """Take back a version that a server refuses or does not prove: NAME means the one before
        again, and the next version is tried without it."""
        withdrawn = self._versions.pop(ident)
        for server in self.servers:
            with suppress(ServeError), server.lock:
                # It may have proved the version that another one refuses.
                if server.current is withdrawn:
                    server.current = server.before
                server.unload(ident)
        self.source.messages.pop(ident, None)

    def _retire(self) -> None:
        """Unload what is old on every server, and only then drop it here: a server may read a
        version again as long as it has its name."""
        # Asked once: what begins from now on asks the newest.
        in_use = self.in_use()
        for version in list(self._versions.values())[: -self.keep]:
            if version.number in in_use:
                continue
            try:
                for server in self.servers:
                    with server.lock:
                        server.unload(version.id)
            except ServerUnreachable:
                # It may come back with it; next time.
                continue
            del self._versions[version.id]
            self.source.messages.pop(version.id, None)
