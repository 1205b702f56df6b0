"""Show the snapshots of one step as a checkpoint's training state, which is read as any other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.adapters.files import INDEX, STATE, STATE_JSON
from megalora.adapters.state_index import FORMAT, rank_file
from megalora.json_text import parse_json
from megalora.train.checkpoint.writer import checkpoint_name
from megalora.train.warm.memory import SnapshotMemory
from megalora.train.warm.rounds import Outbox


@dataclass(frozen=True)
class InMemory:
    """What a rank that was forked has beside its config."""

    memory: SnapshotMemory
    newest: Path | None
    """What ``as_checkpoint`` has made of the snapshots to go on from; None where there are
    none."""
    step: int | None = None
    """Of those."""
    outbox: Outbox | None = None
    """Asked for replicas at the neighbour node; None where none are sent."""
    fetched: SnapshotMemory | None = None
    """Snapshots of ranks of other nodes, which are read once."""


def as_checkpoint(
    memory_of: Mapping[int, SnapshotMemory], step: int, world: int, parent: Path
) -> Path:
    """Make a folder whose files of ranks are the snapshots of a step; nothing is copied.

    Args:
        memory_of: where each rank's snapshot of that step is.
        world: number of ranks.
        parent: a folder to make it in.
    Raises:
        ValueError: a snapshot is not of the rank or of the step that it stands for.
    """
    folder = parent / checkpoint_name(step)
    (folder / STATE).mkdir(parents=True)
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for rank in range(world):
        memory = memory_of[rank]
        described = parse_json(memory.described(rank, step))
        # Tensors of one step beside those of another would train on, and be wrong.
        if (described["rank"], described["step"]) != (rank, step):
            raise ValueError(
                f"the snapshot of rank {rank} at step {step} is that of rank {described['rank']} at"
                f" step {described['step']}"
            )
        state = described["state"]
        for name, row in described["tensors"].items():
            known = tensors.setdefault(name, {**row, "pieces": []})
            known["pieces"] += row["pieces"]
        entry = memory.entry(rank, step)
        files[rank_file(rank)] = (entry.num_bytes, entry.sha256)
        (folder / STATE / rank_file(rank)).symlink_to(memory.path(rank, step))
    # Whoever reads it checks that pieces have every element once, and the digests.
    index = {"format": FORMAT, "world_size": world, "files": files, "tensors": tensors}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / STATE_JSON).write_text(json.dumps(state))
    return folder
