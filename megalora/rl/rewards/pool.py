"""Call rewards in a few processes with a time-out: a call that hangs ends its process only."""

import asyncio
import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalora.rl.rewards.worker import LENGTH, pack

START_S = 300.0
"""A process imports the modules of the rewards when it starts; math-verify alone takes seconds."""
STOP_S = 60.0
"""The kernel ends a process at once, unless the machine has no time for it."""


class Failed(Exception):
    """A call gave no reward; the message says why."""


class Worker:
    """One process. It is started by the first call, and again by the first one after it ended."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.process: asyncio.subprocess.Process | None = None
        self._killed: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process and have it load the rewards.

        Raises:
            Failed: it cannot load them, or it ended.
        """
        # megalora may be importable only because the caller's sys.path says so; the current folder
        # is searched by -m itself.
        root = str(Path(__file__).parents[3])
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [root, os.environ.get("PYTHONPATH")])
        )
        # A session of its own: Ctrl-C is the run's to handle, and what the user's functions start
        # is ended with it.
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "megalora.rl.rewards.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env=environment, start_new_session=True,
        )  # fmt: skip
        # The first message names the rewards; its answer says what cannot be loaded.
        refused = await self._exchange(self.paths, START_S)
        if refused is not None:
            self.kill()
            raise Failed(refused)

    async def call(self, path: str, arguments: tuple[Any, ...], timeout_s: float) -> float | None:
        """What a reward gives.

        Raises:
            Failed: it raised an error, gave something else than a number, or took too long.
        """
        if self.process is None:
            # Its time is not the call's.
            await self.start()
        value, error = await self._exchange((path, arguments), timeout_s)
        if error:
            raise Failed(error)
        return value

    async def _exchange(self, message: Any, timeout_s: float) -> Any:
        """Send a message and wait for the answer; the process is ended where there is none."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        answered = False
        try:
            async with asyncio.timeout(timeout_s):
                # A row may be larger than the pipe: it drains while the process reads.
                process.stdin.write(pack(message))
                await process.stdin.drain()
                header = await process.stdout.readexactly(LENGTH.size)
                answer = await process.stdout.readexactly(*LENGTH.unpack(header))
                answered = True
        except TimeoutError:
            raise Failed(f"took longer than {timeout_s:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            # A negative one is the signal that ended it, such as -9 for want of memory.
            code = await process.wait()
            raise Failed(f"its process ended (exit code {code})") from None
        finally:
            # Also where the caller was cancelled: the answer would be taken for the next one's.
            if not answered:
                self.kill()
        return pickle.loads(answer)

    def kill(self) -> None:
        """End the process, and those that it has started, whatever they do."""
        if self.process is not None:
            # Its number is the group's. The group may be gone already.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._killed = self.process
            self.process = None

    async def stop(self) -> None:
        """End the process and wait until it is gone."""
        self.kill()
        # Also one that was ended a moment ago: the event loop may close behind this.
        if self._killed is not None:
            await asyncio.wait_for(self._killed.wait(), STOP_S)


class Pool:
    """Processes that are given one call each at a time."""

    def __init__(self, paths: Sequence[str], workers: int, timeout_s: float) -> None:
        """
        Args:
            paths: of the rewards that will be called; without any no process is started.
            workers: number of processes.
            timeout_s: seconds of one call; waiting for a free process does not count.
        """
        self.timeout_s = timeout_s
        self.workers = [Worker(paths) for _ in range(workers if paths else 0)]
        self._free: asyncio.LifoQueue[Worker] = asyncio.LifoQueue()

    async def start(self) -> None:
        """Start all processes.

        Raises:
            Failed: the rewards cannot be loaded there.
        """
        try:
            # Side by side: importing is what takes them long.
            await asyncio.gather(*(worker.start() for worker in self.workers))
        except BaseException:
            await self.stop()
            raise
        for worker in self.workers:
            self._free.put_nowait(worker)

    async def call(self, path: str, *arguments: Any) -> float | None:
        """What a reward gives for these arguments.

        Raises:
            Failed: it gives none; see ``Worker.call``.
        """
        # The last one that was free: its caches are warm.
        worker = await self._free.get()
        try:
            return await worker.call(path, arguments, self.timeout_s)
        finally:
            # Also one whose process has ended, which starts again.
            self._free.put_nowait(worker)

    async def stop(self) -> None:
        """End all processes."""
        await asyncio.gather(*(worker.stop() for worker in self.workers))
