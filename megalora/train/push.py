"""Every checkpoint goes to a running server, by name and version, while training goes on.

A thread of the first rank loads what is saved into vLLM (``serve/vllm.py``), in order. Nobody waits for it: when the server is down it
tries again, less and less often; when the server refuses an adapter, it says so and goes on. What was not served is on disk.
"""

import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megalora.bridge.files import CONFIG, PROBE, WEIGHTS
from megalora.bridge.form import num_tensors
from megalora.config import CheckpointConfig
from megalora.serve.adapter_files import tensor_count
from megalora.serve.errors import ServerError, ServerUnreachable
from megalora.serve.proof import prove, read_probe
from megalora.serve.vllm import Client
from megalora.train.setup import AdaptedModel

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
CLOSE_S = 60.0
"""How long the end of a training waits for what is not served yet."""
_WORTH_RETRYING = (ServerUnreachable, ServerError)


@contextmanager
def serving(
    config: CheckpointConfig, model: AdaptedModel, say: Callable[[str], None], resumed: Path | None
) -> Iterator[Callable[[Path], None]]:
    """Yields what to call with every new checkpoint; it does something on the first rank of a run with ``checkpoint.serve``.

    ``resumed``: the checkpoint to begin with, which the server may have missed.
    """
    if config.serve is None or dist.get_rank() != 0:
        yield lambda folder: None
        return
    pusher = Pusher(config.serve, Path(config.dir), num_tensors(model.adapted, model.shape), say)
    if resumed:
        pusher.push(resumed)
    try:
        yield pusher.push
    except BaseException:
        pusher.close(wait_s=5.0)
        raise
    pusher.close()


class Pusher:
    """Serves checkpoints of one run as NAME, the run folder's name, each as the version ``step_N``."""

    def __init__(self, url: str, run: Path, num_tensors: int, say: Callable[[str], None]) -> None:
        """``num_tensors``: what must be in each; ``say`` gets a line for the user, from another thread."""
        self.name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.resolve().name).strip("-._") or "run"
        self.url, self.num_tensors, self.say = url, num_tensors, say
        # What waits and what is served outlives ``checkpoint.keep``: a server reads adapters again, and dies when one is gone.
        self.client = Client(url, store=run / "served")
        self.held = run / "served" / ".waiting"
        shutil.rmtree(self.held, ignore_errors=True)
        self.waiting: queue.Queue[Path | None] = queue.Queue()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._work, name="push", daemon=True)
        self.thread.start()

    def push(self, checkpoint: Path) -> None:
        """Serve it as soon as may be, even if it is removed before."""
        held = self.held / checkpoint.name
        held.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS, PROBE):
            if (checkpoint / name).is_file():
                _keep(checkpoint / name, held / name)
        self.waiting.put(held)

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Wait for what is under way, for so long; say what was not served."""
        self.waiting.put(None)
        self.thread.join(wait_s)
        self.closing.set()
        if self.thread.is_alive():
            self.thread.join(5.0)
            self.say(
                f"serve: {self.url} did not take every checkpoint; all are on disk. A resumed run pushes its last one again"
            )
        self.client.close()

    def _work(self) -> None:
        while (checkpoint := self.waiting.get()) is not None and not self.closing.is_set():
            self._serve(checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _serve(self, checkpoint: Path) -> None:
        wait_s, start, said = FIRST_WAIT_S, time.monotonic(), False
        while not self.closing.is_set():
            try:
                self.say(f"serve: {self._swap(checkpoint)}")
                return
            except _WORTH_RETRYING as error:
                if not said:
                    self.say(f"serve: {checkpoint.name} waits ({error}); trying again, training goes on")
                    said = True
            except (ValueError, OSError) as error:
                self.say(f"serve: {checkpoint.name} is NOT served: {error} (the checkpoint is whole, training goes on)")
                return
            self.closing.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self.say(f"serve: {checkpoint.name} was not served in {time.monotonic() - start:.0f} s")

    def _swap(self, checkpoint: Path) -> str:
        """What to tell of it."""
        if (found := tensor_count(checkpoint)) != self.num_tensors:
            raise ValueError(f"{checkpoint} has {found} tensors, and this run adapts {self.num_tensors}")
        model = self.client.swap(self.name, checkpoint, checkpoint.name)  # its id holds the contents' hash
        if (now := self.client.resolve(self.name)) != model:
            return f"{model} is loaded, but {self.name} means {now}: does another run use this name?"
        if read_probe(checkpoint) is None:
            return f"{model} at {self.url}"
        return f"{self.url} has {prove(self.client, model, checkpoint).text()}"


def _keep(file: Path, place: Path) -> None:
    """The same file under another name, which takes no time and no space; a copy where the file system has no links."""
    place.unlink(missing_ok=True)
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
