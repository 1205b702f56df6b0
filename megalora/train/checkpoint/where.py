"""Find the checkpoint to resume from: the one that ``latest`` names, else the newest whole one. A
run never starts afresh beside checkpoints."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from megalora.adapters.cycles import cycle_file
from megalora.adapters.files import (
    AVERAGE,
    AVERAGE_KEY,
    CONFIG,
    INDEX,
    OPTIMIZER,
    RNG,
    START,
    START_KEY,
    STATE,
    STATE_JSON,
    STATE_KEYS,
    WEIGHTS,
)
from megalora.adapters.latest import (
    CHECKPOINT_NAME,
    LATEST,
    checkpoints,
    latest_adapter,
    read_latest,
    taken_note,
)
from megalora.adapters.state_index import read_index
from megalora.adapters.sums import SUMS, check_sums
from megalora.adapters.training_state import SavedState, read_state
from megalora.config import RunConfig
from megalora.first_rank import on_first_rank
from megalora.hf.safetensors import read_header
from megalora.train.checkpoint.writer import checkpoint_name, point_latest_at


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, whole; None for a fresh start."""

    state: SavedState | None
    notes: list[str] = field(default_factory=list)
    """Lines for the user."""
    on_disk: SavedState | None = None
    """The checkpoint that was passed over for snapshots in memory, which are newer."""


def find_checkpoint(config: RunConfig, restarted: bool = False) -> Found:
    """The checkpoint to resume from. The first rank decides for all, because a shared file system
    may show a file later on another node.

    Args:
        restarted: this very job has written to the run folder before (torchrun has started its
            ranks again), so the folder's checkpoints are its own and it goes on from the newest,
            whatever ``checkpoint.resume`` says.
    Raises:
        ValueError: on every rank, for a folder that is not a checkpoint, and rather than mix two
            runs in one folder.
    """
    run = Path(config.checkpoint.dir)
    return on_first_rank(
        lambda: _find(config, run, restarted), f"could not look for a checkpoint in {run}"
    )


def newer_of(found: Found, in_memory: Path | None) -> Found:
    """What to go on from where ranks were started again: their snapshots in memory, unless the disk
    has a later step.

    Args:
        in_memory: what ``as_checkpoint`` has made of the snapshots; None where there are none.
    """
    if in_memory is None:
        return found
    state = replace(read_state(in_memory), in_memory=True)
    if found.state is not None and found.state.step > state.step:
        return found
    note = f"the ranks were started again; going on from step {state.step} in memory"
    return Found(state, [note], on_disk=found.state)


def _find(config: RunConfig, run: Path, restarted: bool) -> Found:
    resume = config.checkpoint.resume
    there = checkpoints(run)
    if restarted and there:
        found = _newest(run, there)
        assert found.state is not None
        return Found(
            found.state,
            [f"the ranks were started again; going on from {found.state.folder}", *found.notes],
        )
    if resume is True:
        return _newest(run, there)
    state: SavedState | None = None
    notes: list[str] = []
    if resume:
        given = Path(str(resume))
        folder = latest_adapter(given)
        if note := taken_note(given, folder):
            notes = [note]
        state = read_whole(folder, f"checkpoint.resume={resume}")
    # Only the run that made these checkpoints may go on among them.
    if there and (state is None or state.folder.resolve().parent != run.resolve()):
        raise ValueError(
            f"checkpoint.dir={run} already holds {there[-1].name}. Set checkpoint.resume=true to"
            " continue that run, or choose another checkpoint.dir."
        )
    if state is None:
        return Found(None)
    return Found(state, [*notes, *_roll_back(run, there, state)])


def _roll_back(run: Path, there: list[Path], state: SavedState) -> list[str]:
    """Let ``latest`` name a checkpoint of this run's own that it goes back to, so that another
    resumption starts from there too; returns lines for the user."""
    own = [folder for folder in there if folder.resolve() == state.folder.resolve()]
    if not own:
        return []
    # The last one as well: after a run had gone back, ``latest`` names an earlier one.
    point_latest_at(own[0])
    if own[0] == there[-1]:
        return []
    return [
        f"going back to {own[0].name}: later checkpoints stay until their steps are saved again"
    ]


def _newest(run: Path, there: list[Path]) -> Found:
    """The checkpoint that ``latest`` names if that is whole, else the whole one saved last."""
    try:
        named = read_latest(run)
        if named is not None:
            return Found(read_whole(named, f"{run / LATEST} names {named}, which"))
        reason = f"{run} has checkpoints but no {LATEST}"
    except ValueError as error:
        named = None
        # A fresh start would hide that something was here.
        reason = str(error)
        if not there:
            raise ValueError(
                f"{reason}. No other checkpoint is there; remove {run / LATEST} to start anew"
            ) from None
    if not there:
        return Found(None)
    whole: list[SavedState] = []
    faults: list[str] = []
    for folder in there:
        try:
            whole.append(read_whole(folder, folder.name))
        except ValueError as error:
            faults.append(str(error))
    if not whole:
        raise ValueError(
            f"{reason}, and none of its {len(there)} checkpoints is whole"
            f" ({'; '.join(faults[:3])}). Restore one, or choose another checkpoint.dir."
        )
    # By the time of saving: after a roll-back, folders with larger numbers may be older.
    newest = max(whole, key=lambda state: (state.saved_at, state.step))
    return Found(
        newest, [f"{reason}; going on from {newest.folder.name}, the newest whole checkpoint"]
    )


def read_whole(folder: Path, what: str) -> SavedState:
    """The state of a checkpoint that has all its files, each of full length.

    Args:
        what: the subject of the message.
    Raises:
        ValueError: a file is missing, cut short or damaged. Digests of the ranks' files are left to
            ``load.py``; those of all others are compared here, where there are any.
    """
    try:
        state = read_state(folder)
    except ValueError as error:
        raise ValueError(f"{what} is not a checkpoint: {error}") from None
    # Tensors of one step with the counts of another would train on, and be wrong.
    if CHECKPOINT_NAME.fullmatch(folder.name) and folder.name != checkpoint_name(state.step):
        raise ValueError(
            f"{what} is not a whole checkpoint: {STATE_JSON} in it is that of step {state.step}"
        )
    tensors: list[str | Path] = [WEIGHTS]
    for number in range(state.cycles):
        tensors.append(cycle_file(Path(STATE), number))
    keys = [STATE_KEYS[0]]
    if (state.config.get("objective") or {}).get("reference") == "start":
        keys.append(START_KEY)
    if state.config.get("train", {}).get("ema_decay"):
        keys.append(AVERAGE_KEY)
    of_ranks: list[str] = []
    if (folder / INDEX).is_file():
        of_ranks = _check_indexed(folder, keys, what)
    else:
        tensors += _old_files(state, keys)
    for name in [CONFIG, *tensors]:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{what} is not a whole checkpoint: it has no {name}")
        if name in tensors:
            _check_whole(path, what)
    if state.has_sums or (folder / SUMS).is_file():
        needed = [Path(name) for name in (CONFIG, *tensors, INDEX, STATE_JSON, *of_ranks)]
        try:
            # The ranks share out their own files, which are the large ones (``load.py``).
            check_sums(folder, needed, of_ranks)
        except ValueError as error:
            raise ValueError(f"{what} is not a whole checkpoint: {error}") from None
    return state


def _check_indexed(folder: Path, keys: list[str], what: str) -> list[str]:
    """Names of the ranks' files; raises ``ValueError`` unless they are there at full length, with
    these keys."""
    try:
        index = read_index(folder)
    except ValueError as error:
        raise ValueError(f"{what} is not a whole checkpoint: {error}") from None
    for name, (num_bytes, _) in index.files.items():
        path = folder / STATE / name
        if not path.is_file():
            raise ValueError(f"{what} is not a whole checkpoint: it has no {STATE}/{name}")
        if path.stat().st_size != num_bytes:
            raise ValueError(
                f"{what} is not a whole checkpoint: {path} has {path.stat().st_size:,} bytes, not"
                f" the {num_bytes:,} of {INDEX.name}"
            )
    there = {key for tensor in index.tensors.values() for key in tensor.keys}
    for key in keys:
        if key not in there:
            raise ValueError(f"{what} is not a whole checkpoint: {INDEX} has no {key}")
    return [f"{STATE}/{name}" for name in index.files]


def _old_files(state: SavedState, keys: list[str]) -> list[Path]:
    """Files of tensors in a checkpoint of format 1."""
    files = [OPTIMIZER]
    # An imported adapter comes without generators.
    if state.imported_from is None:
        files.append(RNG)
    if START_KEY in keys:
        files.append(START)
    if AVERAGE_KEY in keys:
        files.append(AVERAGE)
    return files


def _check_whole(path: Path, what: str) -> None:
    try:
        # Compares the header's offsets with the file's length.
        read_header(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{what} is not a whole checkpoint: {path} is damaged ({error})") from None
