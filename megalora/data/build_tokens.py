"""Build a token store: tokenise the rows of a source in several processes and write them in order.

Neither the writing process nor any other ever holds more than a few chunks of rows.
"""

import hashlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalora.data.chunk import Chunk
from megalora.data.columns import used_columns
from megalora.data.encode_rows import EncodedChunk, RowEncoder
from megalora.data.pairs import resolve
from megalora.data.rollouts import resolve_rollouts
from megalora.data.rows import Rows, open_rows
from megalora.data.scored import Scoring, resolve_scored
from megalora.data.tokens import SAMPLES, TOKENS, Header
from megalora.wording import first_few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START_METHOD = "forkserver"
"""How processes start. A rank has threads of its own (NCCL's, gloo's), with which it must not
fork; the fork server is a clean process that imports everything once."""
ROWS_PER_WORKER = 5_000
"""Starting processes takes as long as tokenising so many rows: fewer are not worth one."""
_PARTICULARS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d+""")
"""Quoted texts and numbers in a reason, by which reasons of one kind differ."""
_NUM_NAMED = 5
"""Rows that are named of those refused for the same reason."""


@dataclass(frozen=True)
class Recipe:
    """How rows of a source become samples."""

    source: str
    tokenizer: "PreTrainedTokenizerBase"
    format: str | Mapping[str, str]
    allow_left_out: Collection[str] = ()
    workers: int | None = None
    """Processes; None for as many as there are cores and rows for."""
    every_refusal: bool = False
    """Try all rows and name all that are refused, instead of the first alone."""
    pairs: bool = False
    """Whether a row holds a preferred and a rejected answer."""
    labels: bool = False
    """Whether a row says if its answer is good."""
    scoring: Scoring | None = None
    """What a score head is to learn; None for a language model."""
    rollouts: bool = False
    """Whether a row is a completion with its reward."""


def build_store(recipe: Recipe, folder: Path, made_of: dict[str, Any]) -> None:
    """Write the store of a source into an empty folder.

    Raises:
        ValueError: a row that cannot be read or tokenised, or of which something would be left out
            (with its number).
    """
    source = recipe.source
    rows = open_rows(source)
    # The first row decides for all, so that no row is read otherwise than the one before.
    first = next(next(rows.chunks()).rows())
    try:
        columns = _columns_of(recipe, first.keys())
        encoder = RowEncoder(
            recipe.tokenizer, columns, recipe.allow_left_out, recipe.every_refusal, recipe.scoring,
            recipe.rollouts,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    refused: dict[int, str] = {}
    # Chunks come back in the order of the rows, so that the first refusal is that of the first
    # refused row, and the store is the same whatever the number of processes.
    with _Writer(folder) as writer, _bar(source, len(rows)) as bar:
        for chunk in _encoded(recipe, rows, encoder):
            bar.advance(chunk.num_rows)
            refused |= chunk.refused
            if refused and not recipe.every_refusal:
                break
            # Also after a refusal, when nothing of it will be kept.
            writer.add(chunk)
    if refused:
        raise ValueError(f"{source}: {_refusals(refused, len(rows))}")
    writer.finish(source, made_of, columns)


def _columns_of(recipe: Recipe, columns: Collection[str]) -> dict[str, str]:
    """Which of the first row's columns holds what; raises ``ValueError``."""
    if recipe.rollouts:
        return resolve_rollouts(recipe.format, columns)
    if recipe.scoring is not None:
        return resolve_scored(recipe.format, columns, recipe.scoring)
    return resolve(recipe.format, columns, pairs=recipe.pairs, labels=recipe.labels)


class _Writer:
    """Writes tokens and records of chunks, in the order in which they come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens: IO[bytes] = (folder / TOKENS).open("wb")
        self.samples: IO[bytes] = (folder / SAMPLES).open("wb")
        self.digest = hashlib.sha256()
        self.num_samples = 0
        self.num_tokens = 0
        self.left_out: dict[tuple[str, ...], int] = {}
        self.columns: dict[str, None] = {}

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.tokens.close()
        self.samples.close()

    def add(self, chunk: EncodedChunk) -> None:
        # From the chunk's list of what is left out to the store's.
        own = [self.left_out.setdefault(kinds, len(self.left_out)) for kinds in chunk.left_out]
        chunk.samples["left_out"] = np.array(own, np.uint16)[chunk.samples["left_out"]]
        records = chunk.samples.tobytes()
        self.samples.write(records)
        self.digest.update(records)
        # The digest of tokens.bin would say nothing that those of its samples do not.
        self.tokens.write(chunk.tokens.tobytes())
        self.num_samples += len(chunk.samples)
        self.num_tokens += len(chunk.tokens)
        self.columns |= chunk.columns

    def finish(self, source: str, made_of: dict[str, Any], columns: dict[str, str]) -> None:
        """Write the header, without which the folder is no store."""
        used = used_columns(columns)
        header = Header(
            made_of=made_of,
            source=source,
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            columns=columns,
            unused_columns=[column for column in self.columns if column not in used],
            left_out=[list(kinds) for kinds in self.left_out],
            samples_sha256=self.digest.hexdigest(),
        )
        header.write(self.folder)


def _encoded(recipe: Recipe, rows: Rows, encoder: RowEncoder) -> Iterator[EncodedChunk]:
    """The tokenised chunks of all rows, in order."""
    workers = recipe.workers
    if workers is None:
        # The cores that this process may use: a container has fewer than its machine.
        workers = min(len(os.sched_getaffinity(0)), len(rows) // ROWS_PER_WORKER)
    # No process is started for few rows: importing transformers takes seconds.
    if workers <= 1:
        yield from map(encoder.encode, rows.chunks())
        return
    context = get_context(START_METHOD)
    # What the fork server imports is shared by all workers, which then start in milliseconds.
    context.set_forkserver_preload(["transformers.utils.chat_template_utils", __name__])
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(encoder,)
    )
    waiting: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in rows.chunks():
            waiting.append(pool.submit(_encode_in_worker, chunk))
            # One chunk each to work on and one to go on with; more would only fill memory.
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    # A plain pool would wait for the chunk of a killed process for ever.
    except BrokenProcessPool as error:
        raise ValueError(
            f"{recipe.source}: a process that tokenises was killed, most likely for lack of memory;"
            f" use fewer than data.workers={workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# Set once, when the process starts: sending the tokenizer with each chunk would take longer than
# tokenising it.
_worker: list[RowEncoder] = []
"""The encoder of this process, where it is a worker."""


def _start_worker(encoder: RowEncoder) -> None:
    _worker.append(encoder)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the writing process to end: one that was killed tells its workers nothing."""
    # Its other workers hold the pipe open, so that no end of file tells them either.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    return _worker[0].encode(chunk)


class _bar:
    """A progress bar on a terminal; in a log, one line when tokenising takes long."""

    AFTER_S = 10.0

    def __init__(self, source: str, num_rows: int) -> None:
        # Standard output belongs to the command: ``megalora data`` prints samples there.
        console = Console(file=sys.stderr)
        self.what = f"tokenising {source}"
        self.num_rows = num_rows
        self.since = time.monotonic()
        self.said = console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task(self.what, total=num_rows)

    def __enter__(self) -> "_bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, num_rows: int) -> None:
        self.progress.advance(self.task, num_rows)
        if not self.said and time.monotonic() - self.since > self.AFTER_S:
            self.said = True
            done = self.progress.tasks[0].completed
            print(f"{self.what}: {done:,.0f} of {self.num_rows:,} rows", file=sys.stderr)


def _refusals(refused: Mapping[int, str], num_rows: int) -> str:
    """Why rows are refused: the reason of a single row, or each kind of reason with its first rows.

    Reasons are of one kind if they differ only in quoted texts and numbers.
    """
    if len(refused) == 1:
        ((number, reason),) = refused.items()
        return f"row {number}: {reason}"
    kinds: dict[str, list[int]] = {}
    for number, reason in refused.items():
        kinds.setdefault(_PARTICULARS.sub("#", reason), []).append(number)
    lines = [f"{len(refused):,} of {num_rows:,} rows are refused"]
    # The most frequent kind first; its first row gives the reason word for word.
    for numbers in sorted(kinds.values(), key=len, reverse=True):
        first = first_few(numbers, _NUM_NAMED)
        reason = refused[numbers[0]].replace("\n", "\n  ")
        lines.append(f"  {len(numbers):,} (rows {first}): {reason}")
    return "\n".join(lines)
