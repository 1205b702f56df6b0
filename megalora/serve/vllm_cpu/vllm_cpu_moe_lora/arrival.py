"""Take adapters from a running training, inside vLLM's HTTP server.

``POST /v1/load_lora_adapter {"lora_name": NAME@LABEL.HASH, "lora_path": URL}`` takes, beside a
folder,

    http://HOST:PORT/adapters/ID                    the message is fetched from the training
    group://HOST:PORT/ID?http=PORT&epoch=&rank=&size=   it is broadcast to all servers at once

The message goes into a file of this machine, is checked there, and is loaded from it. So decoding
goes on while bytes arrive; all workers of the machine share one copy; and an adapter that vLLM
reads again, in the middle of a request, is there even when the training has ended.

Only the training whose address this server was started with is asked ($MEGALORA_TRAINER), with the
secret that both have ($MEGALORA_TRAINER_TOKEN): whoever may load adapters could otherwise make the
server fetch anything.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import http.client
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, urlsplit

import torch
from torch import Tensor

from . import wire
from .broadcast import Group

TRAINER = "MEGALORA_TRAINER"
TOKEN = "MEGALORA_TRAINER_TOKEN"
SCHEMES = ("http", "group")
STALL_S = 60.0
"""Seconds without a byte after which the training counts as gone."""
RETAINED = 2
"""Files kept of versions that were unloaded last: their requests may still be running."""
_PREFIX = "megalora-live-"


class Refused(Exception):
    """The adapter cannot be taken; the status is that of the answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def is_live(path: str) -> bool:
    """Whether this is an address of a training, not a folder or a name on the hub."""
    return urlsplit(path).scheme in SCHEMES


def check_trainer(url: SplitResult, trainer: str | None) -> None:
    """Raise ``Refused`` unless ``url`` is an address of the one training.

    Args:
        trainer: ``http://HOST:PORT``, or ``http://HOST`` for any port of it; None for no training.
    """
    if not trainer:
        raise Refused(
            f"this server takes adapters from no training, and not from {url.netloc}: it was"
            f" started without --trainer ({TRAINER})",
            403,
        )
    allowed = urlsplit(trainer)
    # The group's store has a port of its own.
    same_port = allowed.port in (None, url.port) or url.scheme == "group"
    if url.hostname != allowed.hostname or not same_port:
        raise Refused(f"this server takes adapters from {trainer} only, not {url.netloc}", 403)


def fetch(url: SplitResult, ident: str, place: Path) -> None:
    """Write the training's message into a file, unchecked; a partial file stays after an error.

    Raises ``Refused``.
    """
    assert url.hostname is not None
    # No proxies and no redirects: nothing but this address is asked.
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=STALL_S)
    try:
        token = os.environ.get(TOKEN)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", url.path, headers=headers)
        answer = connection.getresponse()
        _check_status(answer.status, url, ident)
        total = int(answer.headers["Content-Length"])
        view = memoryview(file_of(place, total).numpy())
        at = 0
        while at < total:
            got = answer.readinto(view[at:])
            if not got:
                raise Refused(f"{ident} broke off after {at} of {total} bytes", 502)
            at += got
    except (OSError, http.client.HTTPException) as error:
        raise Refused(
            f"{ident}: the training at {url.netloc} does not answer ({error})", 502
        ) from None
    finally:
        connection.close()


def _check_status(status: int, url: SplitResult, ident: str) -> None:
    if status == 401:
        raise Refused(
            f"the training at {url.netloc} refuses this server's token: both need the same {TOKEN}",
            403,
        )
    if status == 404:
        raise Refused(
            f"the training at {url.netloc} no longer has {ident}; unload it here before it is"
            " dropped there",
            404,
        )
    if status != 200:
        raise Refused(f"{ident}: the training at {url.netloc} answers {status}", 502)


def file_of(place: Path, size: int) -> Tensor:
    """A new file of ``size`` bytes as uint8 that writes into it."""
    # Without contents: memory is taken as bytes arrive.
    with place.open("wb") as file:
        file.truncate(size)
    return torch.from_file(str(place), shared=True, size=size, dtype=torch.uint8)


def read_file(place: Path) -> Tensor:
    """A file as uint8, of which writing changes this process's copy alone."""
    return torch.from_file(str(place), shared=False, size=place.stat().st_size, dtype=torch.uint8)


@dataclass
class Arrivals:
    """Messages of one server, each in a file."""

    folder: Path
    unloaded: list[str] = field(default_factory=list)
    """Ids that are no longer served and have a file, the oldest first."""
    groups: dict[tuple[str, str], Group] = field(default_factory=dict)
    """By address and epoch."""

    def place(self, ident: str) -> Path:
        # An id is a name that a client chose.
        if "/" in ident or ident.startswith("."):
            raise Refused(f"{ident!r} is not an adapter's id", 400)
        return self.folder / ident

    def take(self, ident: str, path: str) -> tuple[str, dict]:
        """Bring the message into a file; returns the address with the file behind ``#``, and its
        header. Raises ``Refused``."""
        url = urlsplit(path)
        check_trainer(url, os.environ.get(TRAINER))
        place = self.place(ident)
        source = url._replace(fragment="")
        if url.scheme == "group":
            query = dict(parse_qsl(url.query))
            # Whoever needs it again, such as a worker on another machine, asks by http.
            netloc = f"{url.hostname}:{query['http']}"
            source = SplitResult("http", netloc, f"/adapters/{ident}", "", "")
        # Beside the place, so that renaming copies nothing.
        part = place.with_name(f".{ident}.part")
        try:
            if url.scheme == "group":
                self._receive(url, part)
            else:
                fetch(source, ident, part)
            header, buffer = wire.split(read_file(part))
            wire.check(header, buffer, ident)
            # Under its own name only when it is whole.
            part.rename(place)
        except wire.Damaged as error:
            raise Refused(str(error), 502) from None
        finally:
            part.unlink(missing_ok=True)
        # Served again, so that its file must not go.
        if ident in self.unloaded:
            self.unloaded.remove(ident)
        return source._replace(fragment=str(place)).geturl(), header

    def _receive(self, url: SplitResult, part: Path) -> None:
        query = dict(parse_qsl(url.query))
        key = (url.netloc, query["epoch"])
        assert url.hostname is not None and url.port is not None
        try:
            if key not in self.groups:
                # The epoch before is over, and its sockets close with it.
                self.groups.clear()
                self.groups[key] = Group(
                    url.hostname, url.port, int(query["epoch"]), int(query["rank"]),
                    int(query["size"]), float(query["timeout"]),
                )  # fmt: skip
            group = self.groups[key]
            header_bytes, buffer_bytes = group.receive_lengths()
            group.receive(file_of(part, header_bytes + buffer_bytes), header_bytes)
        except RuntimeError as error:
            # Of torch's groups; the sender begins a new epoch.
            self.groups.pop(key, None)
            reason = str(error).splitlines()[0]
            raise Refused(f"the broadcast from {url.netloc} failed: {reason}", 502) from None

    def release(self, ident: str) -> None:
        """Keep the file of an adapter that is no longer served for a while."""
        if self.place(ident).exists():
            self.unloaded.append(ident)
        while len(self.unloaded) > RETAINED:
            self.place(self.unloaded.pop(0)).unlink(missing_ok=True)


def new_folder() -> Path:
    """A folder in memory, removed with this process; those of processes that are gone are removed
    too."""
    memory = Path("/dev/shm")
    root = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    for old in root.glob(f"{_PREFIX}*-*"):
        owner = old.name.removeprefix(_PREFIX).partition("-")[0]
        # A process that was killed removed nothing.
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def install() -> None:
    """Make the handlers of adapters take those of a training."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve import create_error_response

    wrap(OpenAIServingModels, create_error_response)


def wrap(models, error_response) -> None:
    """Wrap the two handlers of vLLM's class.

    Args:
        error_response: vLLM's ``create_error_response``.
    """
    load = models.load_lora_adapter
    unload = models.unload_lora_adapter
    arrivals: list[Arrivals] = []
    # One message at a time: two would share the network, and a group is one conversation.
    taking = asyncio.Lock()

    async def load_arriving(self, request, base_model_name=None):
        known = request.lora_name in self.lora_requests
        # What is loaded already is refused by vLLM itself.
        if known or not request.lora_name or not is_live(request.lora_path):
            return await load(self, request, base_model_name)
        if not arrivals:
            arrivals.append(Arrivals(new_folder()))
        start = time.perf_counter()
        try:
            async with taking:
                path, header = await asyncio.to_thread(
                    arrivals[0].take, request.lora_name, request.lora_path
                )
        except Refused as error:
            return error_response(
                message=str(error), err_type="AdapterRefused", status_code=error.status
            )
        # From here on decoding waits.
        arrived = time.perf_counter()
        answer = await load(self, request.model_copy(update={"lora_path": path}), base_model_name)
        # vLLM has refused it, such as for its rank.
        if request.lora_name not in self.lora_requests:
            arrivals[0].release(request.lora_name)
            return answer
        # What the training is told in place of vLLM's sentence: what was checked, and the seconds.
        taken = {key: header[key] for key in ("label", "hash", "count", "bytes")}
        seconds = {"arrive_s": arrived - start, "load_s": time.perf_counter() - arrived}
        return json.dumps(taken | seconds)

    async def unload_and_release(self, request):
        answer = await unload(self, request)
        if arrivals and request.lora_name not in self.lora_requests:
            with contextlib.suppress(Refused):
                arrivals[0].release(request.lora_name)
        return answer

    models.load_lora_adapter = load_arriving
    models.unload_lora_adapter = unload_and_release
