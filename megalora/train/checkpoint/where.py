"""Where to resume from."""

from pathlib import Path

from megalora.bridge.files import STATE_JSON
from megalora.config import RunConfig
from megalora.train.first_rank import on_first_rank


def find_checkpoint(config: RunConfig) -> Path | None:
    """Where to resume from; None for a fresh start. The first rank decides for all: file systems may be slow to agree.

    Raises ``ValueError``, on every rank, for what is no checkpoint, and rather than mix two runs in one folder.
    """
    return on_first_rank(
        lambda: _find_checkpoint(config), f"could not look for a checkpoint in {config.checkpoint.dir}"
    )


def _find_checkpoint(config: RunConfig) -> Path | None:
    resume, run = config.checkpoint.resume, Path(config.checkpoint.dir)
    if resume is True and not (run / "latest").is_file():
        return None
    folder = run / (run / "latest").read_text().strip() if resume is True else Path(str(resume)) if resume else None
    if folder is not None and not (folder / STATE_JSON).is_file():
        where = f"{run}/latest names {folder}, which" if resume is True else f"checkpoint.resume={resume}"
        raise ValueError(f"{where} is not a checkpoint: it has no {STATE_JSON}")
    if run.exists() and not run.is_dir():
        raise ValueError(f"checkpoint.dir={run} is a file; choose a folder")
    used = sorted(run.glob("step_*"))
    if used and (folder is None or folder.resolve().parent != run.resolve()):
        raise ValueError(
            f"checkpoint.dir={run} already holds {used[-1].name}. Set checkpoint.resume=true to continue that run, or "
            "choose another checkpoint.dir."
        )
    return folder
