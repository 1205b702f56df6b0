"""Say how a run's base lies in memory, and refuse what cannot be done with it."""

from collections.abc import Collection
from pathlib import Path

from megalora.config import RunConfig
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
    notes = (
        unused_note(base),
        held.held_note(found, base.scheme, config.model.dtype),
        _server_note(config, held.rounded_of(found, base)),
    )
    return [note for note in notes if note is not None]


def _server_note(config: RunConfig, rounded: Collection[str]) -> str | None:
    """A line where answers are sampled on other values than those that are trained on."""
    samples = config.rl.servers or config.rl.start_servers is not None
    if not samples or not rounded:
        return None
    return (
        "note: rl.servers have the base as it is stored, and this run quantises it to nf4: answers"
        " are sampled from another model than is trained, by the error of quantising"
    )
