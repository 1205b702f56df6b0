"""Write a checkpoint folder so that a whole one can be found whenever the process is killed.

A save changes the run folder in this order, and forces each step to disk before the next:

1. ``.step_N.tmp`` is filled: each rank writes its own file, the first rank all others.
2. Where step N is there already (a run rolled back and trained again), ``latest`` is pointed at
   an earlier checkpoint and the old folder is renamed to ``.step_N.old``.
3. ``.step_N.tmp`` is renamed to ``step_N``.
4. ``latest`` is replaced by a file that names ``step_N``.
5. ``.step_N.old`` is removed.
6. ``best`` is replaced where step N has the lowest evaluation loss (``checkpoint.keep_best``).
7. Checkpoints that are not kept are renamed to ``.step_M.gone`` and removed.

``recover`` cleans up after a save that was killed; the run's lock must be held
(``train/run_folder.py``).
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from megalora.adapters.best_loss import BestLoss
from megalora.adapters.latest import BEST, LATEST, checkpoints, read_latest
from megalora.atomic_folder import force_to_disk, force_tree_to_disk
from megalora.first_rank import is_first_rank, on_every_rank, on_first_rank

_LEFT_OVER = re.compile(r"\.(step_\d{6,18})\.(tmp|old|gone)")


def checkpoint_name(step: int) -> str:
    """Name of a step's folder in its run folder."""
    return f"step_{step:06d}"


def point_latest_at(target: Path) -> None:
    """Let ``latest`` name this checkpoint of its run folder; a loss of power keeps it so."""
    _point(LATEST, target)


def point_best(run: Path, best: BestLoss, keep: bool) -> bool:
    """Let ``best`` name the checkpoint of the lowest loss; remove it where that is not here, or
    not kept. Returns whether it names one."""
    target = run / checkpoint_name(best.step)
    if keep and best.loss is not None and target.is_dir():
        _point(BEST, target)
        return True
    (run / BEST).unlink(missing_ok=True)
    return False


def _point(name: str, target: Path) -> None:
    # A rename replaces the file at once: a reader finds the old name or the new one.
    pointer = target.with_name(f".{name}.tmp")
    pointer.write_text(target.name + "\n")
    force_to_disk(pointer)
    pointer.rename(target.with_name(name))
    force_to_disk(target.parent)


def write_together[T](
    target: Path,
    own: Callable[[Path], T],
    rest: Callable[[Path, list[T]], None],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Let all ranks fill a folder beside ``target``, then put it in place; ``latest`` follows.
    Collective.

    Args:
        own: writes a rank's own file into the folder and forces it to disk.
        rest: called on every rank with what ``own`` returned on each; the first rank writes all
            else.
        group: of the world's ranks; None for the world's own.
    Raises:
        ValueError: on every rank, when one cannot write. What was there before is still there.
    """
    failure = f"could not save {target.name}; earlier checkpoints are whole"
    temporary = on_first_rank(lambda: _begin(target), failure, group)
    try:
        made = on_every_rank(lambda: own(temporary), failure, group)
        fault: Exception | None = None
        try:
            rest(temporary, made)
        except (OSError, ValueError, SafetensorError) as error:
            fault = error
        on_first_rank(lambda: _finish(temporary, target, fault), failure, group)
    # Ctrl-C as well: half a folder serves nobody.
    except BaseException:
        if is_first_rank():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _begin(target: Path) -> Path:
    """An empty folder beside ``target``. The run folder must be there: a new one in its place
    would lack the run's config and its earlier checkpoints."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def _finish(temporary: Path, target: Path, fault: Exception | None) -> None:
    """Put a filled folder in place, unless it could not be filled."""
    if fault is not None:
        raise fault
    force_tree_to_disk(temporary)
    # A folder cannot be renamed onto one that has content.
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        _put_aside(target, old)
    # Forced to disk in between: a loss of power must not keep ``latest`` and lose what it names.
    temporary.rename(target)
    force_to_disk(target.parent)
    point_latest_at(target)
    if old.exists():
        shutil.rmtree(old)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill meanwhile leaves no half of it under its name."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    # Behind a loss of power, too, no folder that has lost files may have a checkpoint's name.
    force_to_disk(folder.parent)
    shutil.rmtree(gone)


def recover(run: Path) -> None:
    """Remove what killed saves have left in a run folder that no other run writes to, and put back
    a checkpoint that one had put aside."""
    for path in sorted(run.iterdir()):
        match = _LEFT_OVER.fullmatch(path.name)
        # Killed before the new folder was in place: the old one is still the step's checkpoint.
        if match and match[2] == "old" and not (run / match[1]).exists():
            path.rename(run / match[1])
        elif match:
            shutil.rmtree(path)
    for name in (LATEST, BEST):
        (run / f".{name}.tmp").unlink(missing_ok=True)


def make_run_folder(run: Path) -> None:
    """Make the run folder and those above it where they are missing; a loss of power keeps them."""
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        force_to_disk(folder.parent)


def _put_aside(target: Path, old: Path) -> None:
    """Rename a checkpoint that is about to be replaced; ``latest`` must not name it meanwhile if
    there is an earlier one."""
    run = target.parent
    try:
        named = read_latest(run)
    except ValueError:
        # Damaged: it names no checkpoint that could be lost.
        named = None
    # Killed between the two renames, a run must resume from a checkpoint that is in place.
    if named == target:
        there = checkpoints(run)
        if earlier := there[: there.index(target)]:
            point_latest_at(earlier[-1])
    target.rename(old)
    force_to_disk(run)
