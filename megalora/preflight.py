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
from megalora.data.logits_header import check_logits, is_logits_folder
from megalora.data.sources import locate
from megalora.hf.folder import is_written_as_path, shards_that_are_there
from megalora.hf.hub import check_data_set, check_model
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import plan_of
from megalora.model.fields import model_shape
from megalora.model.second_model import plan_second
from megalora.paths import check_folder_to_write
from megalora.train.trackers import check_installed


def check_run(
    path: str | Path, overrides: Sequence[str], num_ranks: int, *, samples: bool = False
) -> RunConfig:
    """Read a run's config and check it against its files and the number of ranks.

    What is on the hub is left to the ranks, which download it, once the hub has answered for it.

    Args:
        samples: as in ``check_command``.
    Raises:
        ValueError: the first thing that the ranks would refuse.
    """
    config = load_config(path, overrides)
    config.check_world(num_ranks)
    config.check_training()
    check_command(config, samples=samples)
    check_paths(config)
    check_installed(config.log)
    base = Path(config.model.path)
    if base.is_dir():
        # Raises for targets that match nothing, and for layouts that do not fit the
        # model.
        plan_of(config, base)
    else:
        check_model(config.model.path, "model.path")
    check_teacher(config, base)
    # Last, for the hub may take long to answer.
    check_hub_data(named_data(config))
    return config


def check_command(config: RunConfig, *, samples: bool) -> None:
    """Raise ``ValueError`` unless a config is one for the command that got it.

    Args:
        samples: whether the command samples completions, as ``megalora rl`` does.
    """
    if config.rl.is_on and not samples:
        raise ValueError(
            "this config has rl.rewards, with which a run samples its completions: start it with"
            " megalora rl"
        )
    if samples and config.checkpoint.snapshots is not None:
        raise ValueError(
            "checkpoint.snapshots is for megalora train: ranks that sample completions have servers"
            " of their own, which no snapshot holds; leave it out"
        )
    if samples and not config.rl.is_on:
        raise ValueError(
            "megalora rl needs rl.rewards, which say how completions are judged; a file of judged"
            " completions is trained on by megalora train"
        )


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
            # A step's name alone is typed often.
            in_run = Path(config.checkpoint.dir) / folder.name
            hint = ""
            if in_run != folder and (in_run / STATE_JSON).is_file():
                hint = f"; did you mean checkpoint.resume={in_run}?"
            raise ValueError(
                f"checkpoint.resume={resume} is not a checkpoint: it has no {STATE_JSON}{hint}"
            )


def check_weights(base: Path) -> None:
    """Raise ``ValueError`` unless a base is of a family that megalora computes, and every file of
    its weights is there."""
    # Of another family first: its files may have other names.
    model_shape(read_hf_config(base))
    shards_that_are_there(base)


def check_inputs(config: RunConfig) -> None:
    """Raise ``ValueError`` unless the model and the data that a config names are there; names on
    the hub are left alone."""
    check_model_path(config.model.path)
    teacher = config.objective.teacher_model
    if teacher is not None and not is_logits_folder(teacher):
        check_model_path(teacher, "objective.teacher")
    for _, source in named_data(config):
        file = locate(source).file
        if file is not None and not os.access(file, os.R_OK):
            raise ValueError(f"{file} cannot be read: no permission")


def check_teacher(config: RunConfig, base: Path) -> None:
    """Raise ``ValueError`` unless a teacher's folder has the base's tokens and fits the layout; of
    a name on the hub, unless the hub has it."""
    name = config.objective.teacher_model
    if name is None:
        return
    if is_logits_folder(name):
        if base.is_dir():
            check_logits(config, base)
        return
    check_model_path(name, "objective.teacher")
    if not Path(name).is_dir():
        check_model(name, "objective.teacher")
    elif base.is_dir():
        plan_second(config.parallel, Path(name), base)


def check_hub_data(named: list[tuple[str, str]]) -> None:
    """Raise ``ValueError`` for a data set of the hub that is neither in its cache nor to be had.

    It is for one process, not for ranks, each of which would ask the hub.

    Args:
        named: (option, source), as ``named_data`` gives them.
    """
    for option, source in named:
        found = locate(source)
        if found.file is None:
            check_data_set(found.hub[0], option)


def named_data(config: RunConfig) -> list[tuple[str, str]]:
    """(option, source) of all data that a config names: files and data sets of the hub."""
    named = [("data.train", source.path) for source in config.data.sources]
    # It may also be a number of samples to hold out.
    if isinstance(config.data.eval, str):
        named.append(("data.eval", config.data.eval))
    return named


def check_model_path(name: str, option: str = "model.path") -> None:
    """Raise ``ValueError`` for a name that is neither a folder of a Hugging Face model nor one that
    the hub may have; ``option`` is what it was given by."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{option}={path}: there is no config.json in this folder")
    elif path.exists():
        raise ValueError(f"{option}={path} is a file; name the folder of a Hugging Face model")
    elif is_written_as_path(name):
        raise ValueError(f"{option}={name}: no such folder")
