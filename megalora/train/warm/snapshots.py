"""Put what a rank trains into memory that outlives it, every so many steps, in the background."""

import json
import threading
from typing import Any

from megalora.adapters.state_index import rows_of
from megalora.train.checkpoint.assembled import own_tensors
from megalora.train.checkpoint.save import Beside, CheckpointWriter
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.warm.memory import SnapshotMemory
from megalora.train.warm.rounds import Rounds


class Snapshots:
    """The snapshots of this rank. They have what its part of a checkpoint has.

    A step's snapshot is copied as for a checkpoint, and a thread writes it to the older of the
    rank's two slots. ``settle`` comes before a collective of each step. So when a rank begins to
    write over the snapshot before the last, all ranks have the last one whole: at any moment there
    is a step that all of them have.
    """

    def __init__(
        self, memory: SnapshotMemory, every: int, writer: CheckpointWriter, rank: int,
        rounds: Rounds | None = None, fetched: SnapshotMemory | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            every: number of steps from one to the next.
            writer: of the run's checkpoints, which knows what belongs to one.
            rounds: of replicas at the neighbour node; None where none are made.
            fetched: what this run has gone on from, of other nodes: given back at the first step.
        """
        self.memory = memory
        self.every = every
        self.writer = writer
        self.rank = rank
        self.rounds = rounds
        self.fetched = fetched
        self._snapshot = Snapshot()
        self._tensors = ""
        """JSON of the pieces that this rank holds, which does not change."""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def settle(self) -> None:
        """Return when the last snapshot is whole.

        Raises:
            ValueError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise ValueError(
                f"rank {self.rank} cannot hold its snapshot in memory ({self._error}); leave out"
                " checkpoint.snapshots, or start fewer ranks on this node"
            ) from self._error

    def take(self, step: int, beside: Beside, state: dict[str, Any]) -> None:
        """Begin to copy; training may go on behind it. ``settle`` has been called.

        Args:
            state: content of state.json, as a checkpoint of this step would have it.
        """
        # All ranks have taken a step, so they have read what they went on from.
        if self.fetched is not None:
            self.fetched.empty()
            self.fetched = None
        self.writer.take(self._snapshot, beside)
        is_sent = self.rounds is not None and self.rounds.begin(step)
        self._thread = threading.Thread(
            target=self._write, args=(step, state, is_sent), name="snapshot", daemon=True
        )
        self._thread.start()

    def _write(self, step: int, state: dict[str, Any], is_sent: bool) -> None:
        try:
            self._snapshot.wait()
            if not self._tensors:
                own = own_tensors(self._snapshot, self.writer.pieces.dtypes, self.rank)
                self._tensors = json.dumps(rows_of(own))
            # Thousands of rows, which would be encoded anew at every step.
            head = json.dumps({"rank": self.rank, "step": step, "state": state})
            described = f'{head[:-1]}, "tensors": {self._tensors}}}'
            kept = self.rounds.kept if self.rounds is not None else set()
            # The next round begins behind ``settle``, so that ``kept`` is that of this step.
            self.memory.write(self.rank, step, self._snapshot.write_to, described.encode(), kept)
            if self.rounds is not None and is_sent:
                self.rounds.outbox.ask(self.rank, step)
        # Training hears of it at its next step, whatever it is.
        except Exception as error:
            self._error = error
