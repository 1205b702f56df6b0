"""Record a Chrome trace of some steps on the first rank (``train.profile``)."""

import contextlib
import gzip
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from torch.profiler import profile, record_function, supported_activities

from megalora import host
from megalora.config.train import Profile


class Trace:
    """Records the steps that a config names, each as a span of its own; other ranks and other steps
    are left alone."""

    def __init__(
        self, config: Profile | None, folder: Path, say: Callable[[str], None], num_done: int
    ) -> None:
        """``num_done``: steps that were finished before this process began."""
        self.config = None
        self.folder = folder
        self.say = say
        self.profiler: profile | None = None
        self.done: list[int] = []
        """Steps that were recorded."""
        if config is not None and dist.get_rank() == 0:
            self.config = config
            if num_done >= config.start:
                say(
                    f"train.profile.start={config.start}: the run goes on after step {num_done},"
                    " so that no trace begins"
                )

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step, counted from 1."""
        if self.config is not None and number == self.config.start:
            # The CPU, and the GPU where there is one.
            self.profiler = profile(activities=supported_activities())
            self.profiler.start()
        if self.profiler is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        self.done.append(number)
        assert self.config is not None
        if len(self.done) == self.config.steps:
            self.finish()

    def finish(self) -> None:
        """Write what was recorded, if anything; a run that ends early has fewer steps."""
        if self.profiler is None:
            return
        # Kernels that are still running would be missing.
        host.synchronize()
        self.profiler.stop()
        if self.done:
            path = self.folder / f"trace_steps_{self.done[0]}_to_{self.done[-1]}.json.gz"
            plain = path.with_suffix("")
            self.profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(path, "wb") as target:
                shutil.copyfileobj(source, target)
            plain.unlink()
            self.say(f"{path}: a trace for chrome://tracing or ui.perfetto.dev")
        self.profiler = None


@contextlib.contextmanager
def tracing(
    config: Profile | None, folder: Path, say: Callable[[str], None], num_done: int
) -> Iterator[Trace]:
    """A ``Trace`` for one block, which writes what it has when the block ends."""
    trace = Trace(config, folder, say, num_done)
    yield trace
    # Not after an error: a device that has failed would not answer.
    trace.finish()
