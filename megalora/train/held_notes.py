"""Say how a run's base lies in memory, and refuse what cannot be done with it."""

from collections.abc import Collection
from pathlib import Path

from megalora.config import RunConfig
from megalora.model import held
from megalora.model.account import BaseFolder, open_folder, unused_note


def notes_of_base(config: RunConfig, folder: Path) -> list[str]:
    """Lines about how the base is stored and held."""
    base = open_folder(folder)
    found = held.held_in(config.model, base)
    notes = (
        _merge_note(config, found, base),
        unused_note(base),
        held.held_note(found, base.scheme, config.model.dtype),
        _server_note(config, held.rounded_of(config.model, found, base)),
    )
    return [note for note in notes if note is not None]


def _merge_note(config: RunConfig, found: held.Held | None, base: BaseFolder) -> str | None:
    """A line about periodic merges where the base is held as codes."""
    if found is None or config.train.relora is None:
        return None
    if base.scheme is not None:
        return (
            f"note: train.relora: the base is stored as {base.scheme.title}, into which most of a"
            " small delta would round away. So nothing is merged: earlier adapters stay beside it,"
            " frozen, and each cycle costs more than the one before"
        )
    return (
        "note: train.relora: each merge quantises the sum of the plain base and all adapters to"
        " nf4. A checkpoint's adapter, their sum, is for the base quantised without them: another"
        " model than trains, by the error of quantising"
    )


def _server_note(config: RunConfig, rounded: Collection[str]) -> str | None:
    """A line where answers are sampled on other values than those that are trained on."""
    samples = config.rl.servers or config.rl.start_servers is not None
    if not samples or not rounded:
        return None
    return (
        "note: rl.servers have the base as it is stored, and this run quantises it to nf4: answers"
        " are sampled from another model than is trained, by the error of quantising"
    )
