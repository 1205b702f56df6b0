"""Compile variants of the grouped GEMM in processes that see no GPU, so that the sweep finds them
in Triton's cache.

    python -m benchmarks.tune_compile 90

A process reads jobs from stdin and answers each with a line. Some variants make some versions of
the compiler abort; that ends a process and costs one variant, which is named with what the process
said last.
"""

import json
import os
import queue
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megalora_kernels.variants import Variant

from benchmarks.gpu_timing import first_line
from benchmarks.tune_points import Gemm, launch, make_operands

JOB_SECONDS = 60
"""Seconds after which a compiler is taken to hang: others take about one."""


@dataclass(frozen=True)
class Job:
    """A kernel to compile, with the strides and integers of ``experts`` experts of the GEMM.

    Triton compiles a kernel anew where an integer argument is 1 or a multiple of 16, so a kernel
    must be compiled here with the arguments of its launch.
    """

    gemm: Gemm
    experts: int
    variant: Variant
    dtype: str = "bfloat16"

    def line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, line: str) -> "Job":
        found = json.loads(line)
        # JSON has lists alone, and a Gemm with a list in it could not be a key.
        gemm = {**found["gemm"], "ranks": tuple(found["gemm"]["ranks"])}
        return cls(Gemm(**gemm), found["experts"], Variant(**found["variant"]), found["dtype"])


def compile_all(
    jobs: Sequence[Job],
    command: Sequence[str],
    num_processes: int,
    seconds: float,
    job_seconds: float = JOB_SECONDS,
) -> dict[Job, str | None]:
    """Compile in parallel.

    Args:
        jobs: what to compile, the most important first.
        command: starts a process that answers each job's line with ``ok`` or a reason.
        num_processes: number of such processes at once.
        seconds: time after which no job is begun.
        job_seconds: time after which a job is taken to hang.

    Returns:
        None for each job that compiled, the reason for each that did not. A job that was not
            reached, or that the end cut off, has no entry.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    found: dict[Job, str | None] = {}
    end = time.monotonic() + seconds

    # A thread for each child: it does nothing but wait for answers, so Python's lock is free.
    def work() -> None:
        child: _Child | None = None
        while time.monotonic() < end:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            child = child or _Child(command)
            # A job that is begun may take its time, but not beyond the end by much.
            allowed_s = min(job_seconds, end - time.monotonic() + 5)
            answer = child.ask(job.line(), allowed_s)
            # With less than a job's own time it was the budget that ended it: it may well compile.
            cut_off = child.timed_out and allowed_s < job_seconds
            if not cut_off:
                found[job] = None if answer == "ok" else answer
            # The next job of this thread starts another.
            if child.died:
                child = None
        if child is not None:
            child.stop()

    _in_threads(work, min(num_processes, len(jobs)))
    return dict(found)


def _in_threads(work: Callable[[], None], count: int) -> None:
    """Run ``work`` in so many threads at once, and wait for all of them."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _Child:
    """One compiling process."""

    def __init__(self, command: Sequence[str]) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in _end)
        # Without the GPU: a context of CUDA takes hundreds of MB of its memory for each process.
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        # Interpreted kernels are not compiled; a dry run compiles one in earnest.
        env.pop("TRITON_INTERPRET", None)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.said, text=True, env=env
        )
        self.died = False
        self.timed_out = False

    def ask(self, line: str, seconds: float) -> str:
        """Its answer, or how it ended."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._end("")
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.process.kill()
                self.timed_out = True
                return self._end(f"not compiled after {seconds:.0f} s; ")
        # An empty line is the end of the pipe: the process has died over this job.
        return self.process.stdout.readline().strip() or self._end("")

    def stop(self) -> None:
        self._end("")

    def _end(self, why: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.died = True
        self.process.stdin.close()
        self.process.stdout.close()
        code = self.process.wait()
        self.said.seek(0)
        lines = [line.strip() for line in self.said if line.strip()]
        self.said.close()
        return f"{why}the compiler's process ended with {code}: {telling_line(lines)[:200]}"


def telling_line(lines: Sequence[str]) -> str:
    """The line of a process's last words that says why it ended."""
    # An abort in MLIR prints its assertion and then pages of stack.
    for line in lines:
        if "ssertion" in line or "error" in line.lower():
            return line
    return lines[-1] if lines else "it said nothing"


# ---- in the process ------------------------------------------------------------------------------


class NamedTarget:
    """As much of a driver as Triton asks for when it compiles for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_only(capability: int) -> None:
    """From here on launches compile for this target and end there."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    # ``warmup`` is Triton's own: compile for these arguments, put the kernel into the cache, and do
    # not launch it.
    def without_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    driver.set_active(NamedTarget(capability))  # pyright: ignore
    JITFunction.run = without_launch  # pyright: ignore


def compile_one(job: Job) -> str:
    """``ok``, or what the compiler said."""
    counts = [1] * job.experts
    operands = make_operands(
        job.gemm, counts, torch.device("cpu"), getattr(torch, job.dtype), filled=False
    )
    try:
        launch(operands, job.variant)
    except Exception as error:
        # Whatever a compiler raises: the sweep refuses the variant and says this.
        return first_line(error)
    return "ok"


def main() -> None:
    # 90 for compute capability 9.0.
    compile_only(int(sys.argv[1]))
    for line in sys.stdin:
        print(compile_one(Job.read(line)), flush=True)


if __name__ == "__main__":
    main()
