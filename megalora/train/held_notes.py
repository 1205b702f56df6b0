"""Say how a run's base lies in memory, and refuse what cannot be done with it."""

from pathlib import Path

from megalora.config import ModelConfig, RunConfig
from megalora.model import held
from megalora.model.account import open_folder, unused_note


def notes_of_base(config: RunConfig, folder: Path) -> list[str]:
    """Lines about how the base is stored and held.

    Raises:
        ValueError: the base is held as codes and is to be merged into.
    """
    base = open_folder(folder)
    found = held.held_in(config.model, base)
    if found is not None and config.train.relora is not None:
        raise ValueError(
            f"train.relora merges adapters into the base, which is held as {found.form} codes:"
            " most of a small delta would round away. Set model.weight_format=plain"
        )
    notes = (unused_note(base), held.held_note(found, base.scheme, config.model.dtype))
    return [note for note in notes if note is not None]


def rounded_names(config: ModelConfig, folder: Path) -> frozenset[str]:
    """Names of the base's matrices that are quantised as they are read."""
    # Only this quantises anything; else the headers of all files need not be read once more.
    if config.weight_format != "nf4":
        return frozenset()
    base = open_folder(folder)
    return held.rounded_names(held.held_in(config, base), base)
