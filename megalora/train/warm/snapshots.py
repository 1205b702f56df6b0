"""Put what a rank trains into memory that outlives it, every so many steps, in the background."""

import json
import threading
from typing import Any

from megalora.adapters.state_index import rows_of
from megalora.train.checkpoint.assembled import own_tensors
from megalora.train.checkpoint.save import Beside, CheckpointWriter
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.warm.memory import SnapshotMemory


class Snapshots:
    """The snapshots of this rank. They have what its part of a checkpoint has.

    A step's snapshot is copied as for a checkpoint, and a thread writes it to the older of the
    rank's two slots. ``settle`` comes before a collective of each step. So when a rank begins to
    write over the snapshot before the last, all ranks have the last one whole: at any moment there
    is a step that all of them have.
    """

    def __init__(
        self, memory: SnapshotMemory, every: int, writer: CheckpointWriter, rank: int
    ) -> None:
        """
        Args:
            every: number of steps from one to the next.
            writer: of the run's checkpoints, which knows what belongs to one.
        """
        self.memory = memory
        self.every = every
        self.writer = writer
        self.rank = rank
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
        self.writer.take(self._snapshot, beside)
        self._thread = threading.Thread(
            target=self._write, args=(step, state), name="snapshot", daemon=True
        )
        self._thread.start()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            self._snapshot.wait()
            if not self._tensors:
                own = own_tensors(self._snapshot, self.writer.pieces.dtypes, self.rank)
                self._tensors = json.dumps(rows_of(own))
            # Thousands of rows, which would be encoded anew at every step.
            head = json.dumps({"rank": self.rank, "step": step, "state": state})
            described = f'{head[:-1]}, "tensors": {self._tensors}}}'
            self.memory.write(self.rank, step, self._snapshot.write_to, described.encode())
        # Training hears of it at its next step, whatever it is.
        except Exception as error:
            self._error = error
