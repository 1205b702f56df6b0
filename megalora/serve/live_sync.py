"""Load every checkpoint into a running server while training goes on.

A thread of the first rank loads checkpoints into vLLM, in order: from memory
(``live/publisher.py``) where the server takes adapters from this training, else from a folder that
it must see (``serve/vllm.py``). Training does not wait for it. When the server is down, it tries
again, less and less often, and holds the newest few; when the server refuses an adapter, it says so
and continues with the next. Checkpoints that were not served are still on disk.
"""

import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file

from megalora.adapters.files import CONFIG, PROBE, WEIGHTS
from megalora.adapters.write.form import num_tensors
from megalora.config import RunConfig
from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config, read_json_object, stored_dtype
from megalora.lora.adapted_model import AdaptedModel
from megalora.serve.adapter_files import tensor_count
from megalora.serve.errors import (
    AdapterNotFound,
    ServerError,
    ServerUnreachable,
    TrainerRefused,
)
from megalora.serve.live.publisher import Publisher
from megalora.serve.proof import prove, read_probe
from megalora.serve.vllm import Client

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
"""Seconds before the second try, and the longest between two."""
CLOSE_S = 60.0
IDLE_CLOSE_S = 5.0
"""Seconds that the end of a training waits for what is not served yet, and the same for a server
that does not answer."""
MAX_WAITING = 8
"""Checkpoints held for a server that is down, so that ``checkpoint.keep`` still bounds the disk."""


@contextmanager
def serving(
    config: RunConfig, model: AdaptedModel, say: Callable[[str], None], resumed: Path | None
) -> Iterator[Callable[[Path], None]]:
    """Yield a function to call with every new checkpoint.

    It does nothing on other ranks than the first, and in a run without ``checkpoint.serve``.

    Args:
        say: called with lines for the user, from any thread.
        resumed: the checkpoint to begin with, which the server may have missed.
    """
    if config.checkpoint.serve is None or dist.get_rank() != 0:
        yield lambda folder: None
        return
    hf = read_hf_config(local_folder(config.model.path, weights=False))
    # The dtype that megalora serve starts vLLM with.
    served_dtype = str(stored_dtype(hf))
    count = num_tensors(model.adapted, model.shape)
    pusher = Pusher(
        config.checkpoint.serve,
        Path(config.checkpoint.dir),
        count,
        say,
        served_dtype,
        name=config.checkpoint.serve_name,
    )
    if resumed:
        pusher.push(resumed)
    try:
        yield pusher.push
    except BaseException:
        # A training that failed or was interrupted should not keep its ranks for a minute.
        pusher.close(wait_s=IDLE_CLOSE_S)
        raise
    pusher.close()


class Pusher:
    """Serves checkpoints of one run as NAME, each as the version ``step_N``."""

    def __init__(
        self,
        url: str,
        run: Path,
        num_tensors: int,
        say: Callable[[str], None],
        served_dtype: str = "float32",
        *,
        name: str | None = None,
    ) -> None:
        """Start the thread.

        Args:
            run: the run's checkpoint folder.
            num_tensors: number of tensors that every checkpoint must have.
            say: called with lines for the user, from any thread.
            name: NAME; None for the run folder's.
        """
        self.name = name or run_name(run)
        self.url = url
        self.num_tensors = num_tensors
        self.say = say
        self.served_dtype = served_dtype
        # Copies outlive ``checkpoint.keep``: a server reads adapters again, and dies when one is
        # gone.
        self.client = Client(url, store=run / "served")
        self.publisher = _publisher(url, self.name)
        # Why the server takes nothing from memory, once it has said so.
        self.refused = ""
        self.published = 0
        self.held = run / "served" / ".waiting"
        # An earlier run that was killed may have left some.
        shutil.rmtree(self.held, ignore_errors=True)
        # Folders to serve, the oldest first; None tells the thread to end.
        self.waiting: queue.Queue[Path | None] = queue.Queue()
        self.closing = threading.Event()
        self.unreachable = threading.Event()
        # A daemon, which cannot keep the process from ending.
        self.thread = threading.Thread(target=self._work, name="push", daemon=True)
        self.thread.start()

    def push(self, checkpoint: Path) -> None:
        """Serve a checkpoint as soon as possible, even if its folder is removed before.

        Raises no errors of the disk: training is worth more.
        """
        while self.waiting.qsize() >= MAX_WAITING:
            # The thread may have taken the last one meanwhile.
            with suppress(queue.Empty):
                skipped = self.waiting.get_nowait()
                if skipped:
                    shutil.rmtree(skipped, ignore_errors=True)
                    self.say(f"serve: {skipped.name} is skipped: {MAX_WAITING} newer ones wait")
        held = self.held / checkpoint.name
        try:
            held.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, WEIGHTS, PROBE):
                if (checkpoint / name).is_file():
                    _keep(checkpoint / name, held / name)
        except OSError as error:
            self.say(f"serve: {checkpoint.name} is NOT served: {error} (training goes on)")
            return
        self.waiting.put(held)

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Wait for checkpoints that are still to be served, and name those that were not.

        Args:
            wait_s: seconds to wait; at most ``IDLE_CLOSE_S`` for a server that does not answer.
        """
        self.waiting.put(None)
        if self.unreachable.is_set():
            wait_s = min(wait_s, IDLE_CLOSE_S)
        self.thread.join(wait_s)
        # Ends the waiting between two tries, and the work after the checkpoint under way.
        self.closing.set()
        self.thread.join(IDLE_CLOSE_S)
        left = [place.name for place in list(self.waiting.queue) if place]
        if left:
            self.say(
                f"serve: not served: {', '.join(left)}; a resumed run pushes its last checkpoint"
                " again"
            )
        self.client.close()
        if self.publisher is not None:
            self.publisher.close()

    def _work(self) -> None:
        while not self.closing.is_set():
            checkpoint = self.waiting.get()
            if checkpoint is None:
                return
            self._serve(checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _serve(self, checkpoint: Path) -> None:
        """Try until the server has the checkpoint, refuses it, or training ends."""
        wait_s = FIRST_WAIT_S
        start = time.monotonic()
        while not self.closing.is_set():
            try:
                self.say(f"serve: {self._swap(checkpoint)}")
                self.unreachable.clear()
                return
            except (ServerUnreachable, ServerError) as error:
                # One line, not one for every try.
                if not self.unreachable.is_set():
                    self.say(
                        f"serve: {checkpoint.name} waits ({error}); trying again, training goes on"
                    )
                    self.unreachable.set()
            except Exception as error:
                # Whatever it is, neither training nor this thread may end because of it.
                reason = str(error)
                # The type of an error that nobody foresaw says more than its message.
                if not isinstance(error, ValueError | OSError):
                    reason = f"{type(error).__name__}: {reason}"
                self.say(f"serve: {checkpoint.name} is NOT served: {reason} (training goes on)")
                return
            self.closing.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self.say(
            f"serve: {checkpoint.name} was not served in {time.monotonic() - start:.0f} s;"
            f" {self.url} did not take it"
        )

    def _load(self, checkpoint: Path) -> str:
        """Put a checkpoint in place of the one before; returns its id."""
        if self.publisher is not None:
            self.client.check(self.name, checkpoint)
            tensors = load_file(checkpoint / WEIGHTS)
            config = read_json_object(checkpoint / CONFIG)
            self.published += 1
            try:
                model = self.publisher.publish(
                    self.published, tensors, config, label=checkpoint.name
                )
            except TrainerRefused as error:
                # For good: the next one would be refused as well.
                self.refused = f"; from memory: {error}"
                self.publisher.close()
                self.publisher = None
            else:
                # Those that a run before this one has left.
                self.client.unload_older(self.name, model)
                return model
        try:
            return self.client.swap(self.name, checkpoint, checkpoint.name)
        except AdapterNotFound as error:
            raise AdapterNotFound(f"{error}{self.refused}") from None

    def _swap(self, checkpoint: Path) -> str:
        """Serve a checkpoint in place of the one before; returns what to say of it."""
        found = tensor_count(checkpoint)
        if found != self.num_tensors:
            raise ValueError(
                f"{checkpoint.name} has {found} tensors, and this run adapts {self.num_tensors}"
            )
        # Before the swap: a damaged probe must not replace a version that is served.
        has_probe = read_probe(checkpoint) is not None
        # Its id holds the contents' hash.
        model = self._load(checkpoint)
        now = self.client.resolve(self.name)
        if now != model:
            return (
                f"{model} is loaded, but {self.name} means {now}: does another run use this name?"
            )
        if not has_probe:
            return f"{model} is live at {self.url}"
        try:
            proof = prove(self.client, model, checkpoint, served_dtype=self.served_dtype)
        except ValueError as error:
            return f"{model} is live at {self.url}, and could not be proved: {error}"
        return f"{self.url} has {proof.text()}"


def _publisher(url: str, name: str) -> Publisher | None:
    """What sends checkpoints from memory; None where this training has no address that the server
    could reach safely."""
    try:
        # One version: servers keep the file of the one before for requests under way.
        return Publisher([url], name, keep=1)
    except ValueError:
        return None


def run_name(run: Path) -> str:
    """The run folder's name, with ``-`` for what may not stand in a model's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run.resolve().name).strip("-._") or "run"


def _keep(file: Path, place: Path) -> None:
    """Give a file a second name, which takes no time and no space; copy it where the file system
    has no links."""
    place.unlink(missing_ok=True)
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
