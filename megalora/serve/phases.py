"""Tell from vLLM's log what it is doing while it starts."""

import time
from collections.abc import Callable
from pathlib import Path

IMPORTING = "importing vLLM"
PHASES = (
    ("non-default args:", "reading the model's config"),
    ("Initializing a V1 LLM engine", "starting engine and workers"),
    ("Starting to load model", "reading weights"),
    ("Loading weights took", "preparing layers and adapter slots"),
    ("Starting torch.compile", "compiling"),
    ("Warming up model", "compiling"),
    ("KV cache size:", "warming up"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("Supported tasks:", "loading adapters"),
)
"""(text in vLLM 0.32's log, the phase that it begins), in order of their beginning. Of the two that
begin the compiler, vLLM writes one, by platform."""
_LONGEST = max(len(mark) for mark, _ in PHASES)


class Phases:
    """Says each phase once, with the seconds from the start at which it began."""

    def __init__(self, log: Path, say: Callable[[str], None]) -> None:
        self._log = log
        self._say = say
        self._start = time.monotonic()
        # Bytes of the log that have been read, and the end of them, where a text may be cut.
        self._offset = 0
        self._text = ""
        # Place in PHASES of the next one that may begin: every worker writes the same lines, and a
        # phase that is over must not begin again.
        self._next = 0
        self._last = ""
        self.begin(IMPORTING)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def begin(self, phase: str) -> None:
        """Say that ``phase`` begins."""
        if phase != self._last:
            self._say(f"{self.seconds:5.0f} s  {phase}")
        self._last = phase

    def look(self) -> None:
        """Say the phases that have begun since the last look."""
        with self._log.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        # Text, not lines: progress bars end none, and a worker may be in the middle of one.
        # The markers are ASCII, so that a letter that is cut in two hides none.
        self._text += new.decode(errors="replace")
        for place in range(self._next, len(PHASES)):
            mark, phase = PHASES[place]
            if mark in self._text:
                self.begin(phase)
                self._next = place + 1
        self._text = self._text[-_LONGEST:]
