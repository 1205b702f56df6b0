"""Every checkpoint goes to a running server, by name and version, while training goes on.

A thread of the first rank loads what is saved into vLLM (``serve/vllm.py``), in order. Nobody waits
for it: when the server is down it tries again, less and less often, and holds the newest few; when
the server refuses an adapter, it says so and goes on. What was not served is on disk.
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

from megalora.adapters.files import CONFIG, PROBE, WEIGHTS
from megalora.adapters.write.form import num_tensors
from megalora.config import RunConfig
from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config
from megalora.lora.adapted_model import AdaptedModel
from megalora.serve.adapter_files import tensor_count
from megalora.serve.errors import ServerError, ServerUnreachable
from megalora.serve.proof import prove, read_probe
from megalora.serve.vllm import Client

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
CLOSE_S = 60.0
IDLE_CLOSE_S = 5.0
"""How long the end of a training waits for what is not served yet, and where the server does not
answer."""
MAX_WAITING = 8
"""Checkpoints held for a server that is down, so that ``checkpoint.keep`` still bounds the disk."""


@contextmanager
def serving(
    config: RunConfig, model: AdaptedModel, say: Callable[[str], None], resumed: Path | None
) -> Iterator[Callable[[Path], None]]:
    """Yields what to call with every new checkpoint; it does something on the first rank of a run
    with ``checkpoint.serve``.

    ``resumed``: the checkpoint to begin with, which the server may have missed.
    """
    if config.checkpoint.serve is None or dist.get_rank() != 0:
        yield lambda folder: None
        return
    hf = read_hf_config(local_folder(config.model.path, weights=False))
    # what megalora serve starts vLLM with
    served_dtype = str(hf.get("dtype") or hf.get("torch_dtype"))
    count = num_tensors(model.adapted, model.shape)
    pusher = Pusher(config.checkpoint.serve, Path(config.checkpoint.dir), count, say, served_dtype)
    if resumed:
        pusher.push(resumed)
    try:
        yield pusher.push
    except BaseException:
        pusher.close(wait_s=IDLE_CLOSE_S)
        raise
    pusher.close()


class Pusher:
    """Serves checkpoints of one run as NAME, the run folder's name, each as the version
    ``step_N``."""

    def __init__(
        self,
        url: str,
        run: Path,
        num_tensors: int,
        say: Callable[[str], None],
        served_dtype: str = "float32",
    ) -> None:
        """``num_tensors``: what must be in each; ``say`` gets a line for the user, from any
        thread."""
        self.name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.resolve().name).strip("-._") or "run"
        self.url = url
        self.num_tensors = num_tensors
        self.say = say
        self.served_dtype = served_dtype
        # What waits and what is served outlives ``checkpoint.keep``: a server reads adapters again,
        # and dies when one is gone.
        self.client = Client(url, store=run / "served")
        self.held = run / "served" / ".waiting"
        shutil.rmtree(self.held, ignore_errors=True)
        self.waiting: queue.Queue[Path | None] = queue.Queue()
        self.closing, self.unreachable = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name="push", daemon=True)
        self.thread.start()

    def push(self, checkpoint: Path) -> None:
        """Serve it as soon as may be, even if it is removed before; never raises for what happens
        on disk."""
        while self.waiting.qsize() >= MAX_WAITING:
            with suppress(queue.Empty):
                if skipped := self.waiting.get_nowait():
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
        """Wait for what is under way, not for long where nobody answers; say what was not
        served."""
        self.waiting.put(None)
        self.thread.join(min(wait_s, IDLE_CLOSE_S) if self.unreachable.is_set() else wait_s)
        self.closing.set()
        self.thread.join(IDLE_CLOSE_S)
        if left := [place for place in list(self.waiting.queue) if place]:
            self.say(
                f"serve: not served: {', '.join(p.name for p in left)}; a resumed run pushes its"
                " last checkpoint again"
            )
        self.client.close()

    def _work(self) -> None:
        while not self.closing.is_set():
            checkpoint = self.waiting.get()
            if checkpoint is None:
                return
            self._serve(checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _serve(self, checkpoint: Path) -> None:
        wait_s = FIRST_WAIT_S
        start = time.monotonic()
        while not self.closing.is_set():
            try:
                self.say(f"serve: {self._swap(checkpoint)}")
                self.unreachable.clear()
                return
            except (ServerUnreachable, ServerError) as error:
                if not self.unreachable.is_set():
                    self.say(
                        f"serve: {checkpoint.name} waits ({error}); trying again, training goes on"
                    )
                    self.unreachable.set()
            except Exception as error:
                # Whatever it is, training must neither stop nor serve nothing because of it.
                what = (
                    "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
                )
                self.say(
                    f"serve: {checkpoint.name} is NOT served: {what}{error} (training goes on)"
                )
                return
            self.closing.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self.say(
            f"serve: {checkpoint.name} was not served in {time.monotonic() - start:.0f} s;"
            f" {self.url} did not take it"
        )

    def _swap(self, checkpoint: Path) -> str:
        """What to tell of it."""
        if (found := tensor_count(checkpoint)) != self.num_tensors:
            raise ValueError(
                f"{checkpoint.name} has {found} tensors, and this run adapts {self.num_tensors}"
            )
        probed = read_probe(checkpoint) is not None
        # its id holds the contents' hash
        model = self.client.swap(self.name, checkpoint, checkpoint.name)
        if (now := self.client.resolve(self.name)) != model:
            return (
                f"{model} is loaded, but {self.name} means {now}: does another run use this name?"
            )
        if not probed:
            return f"{model} is live at {self.url}"
        try:
            return (
                f"{self.url} has"
                f" {prove(self.client, model, checkpoint, served_dtype=self.served_dtype).text()}"
            )
        except ValueError as error:
            return f"{model} is live at {self.url}, and could not be proved: {error}"


def _keep(file: Path, place: Path) -> None:
    """The same file under another name, which takes no time and no space; a copy where the file
    system has no links."""
    place.unlink(missing_ok=True)
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
