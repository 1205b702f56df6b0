"""Check a run before its ranks start, so that a mistake shows at once, and only once.

Needs no torch.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from megalora.adapters.files import STATE_JSON
from megalora.adapters.latest import latest_adapter
from megalora.config import RunConfig
from megalora.config.file import load_config
from megalora.data.sources import locate
from megalora.hf.folder import is_written_as_path
from megalora.lora.select import plan
from megalora.paths import check_folder_to_write
from megalora.train.trackers import check_installed


def check_run(path: str | Path, overrides: Sequence[str], num_ranks: int) -> RunConfig:
    """Read a run's config and check it against its files and the number of ranks.

    A base model that is only on the hub is left to the ranks, which download it.

    Raises:
        ValueError: the first thing that the ranks would refuse.
    """
    config = load_config(path, overrides)
    config.check_world(num_ranks)
    config.check_training()
    check_paths(config)
    check_installed(config.log)
    base = Path(config.model.path)
    if base.is_dir():
        # Raises for targets that match nothing, and for layouts that do not fit the
        # model.
        plan(config.lora, config.parallel, base, config.train.recompute)
    return config


def check_paths(config: RunConfig) -> None:
    """Raise ``ValueError`` unless the files that a config names exist, and its run folder can be
    written to.

    Names on the hub are left to the ranks, which look in its cache and download.
    """
    # What is read comes first: without it there is nothing to write.
    check_inputs(config)
    check_folder_to_write(Path(config.checkpoint.dir), "checkpoint.dir")
    if isinstance(config.checkpoint.resume, str):
        resume = config.checkpoint.resume
        folder = latest_adapter(Path(resume))
        if not (folder / STATE_JSON).is_file():
            raise ValueError(
                f"checkpoint.resume={resume} is not a checkpoint: it has no {STATE_JSON}"
            )


def check_inputs(config: RunConfig) -> None:
    """Raise ``ValueError`` unless the model and the data that a config names are there; names on
    the hub are left alone."""
    _check_model(config.model.path)
    train = [source.path for source in config.data.sources]
    for source in (*train, config.data.eval):
        # data.eval may also be a number of samples to hold out.
        if isinstance(source, str):
            file = locate(source).file
            if file is not None and not os.access(file, os.R_OK):
                raise ValueError(f"{file} cannot be read: no permission")


def _check_model(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model.path={path}: there is no config.json in this folder")
    elif path.exists():
        raise ValueError(f"model.path={path} is a file; name the folder of a Hugging Face model")
    elif is_written_as_path(name):
        raise ValueError(f"model.path={name}: no such folder")
