"""Check the folders that a command is given, before anything is imported that takes seconds."""

import sys
from pathlib import Path

from megalora.adapters.files import read_config
from megalora.adapters.latest import latest_adapter, taken_note
from megalora.atomic_folder import check_new
from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.preflight import check_weights


def adapter_folder(path: Path) -> Path:
    """The adapter that a path means: its own, or that of a run folder's latest checkpoint, which is
    said.

    Raises:
        ValueError: there is no adapter, or one that megalora does not read.
    """
    folder = latest_adapter(path)
    # Tensors are left to the command, which knows the base that they must fit.
    read_config(folder)
    if note := taken_note(path, folder):
        # Standard output belongs to the command.
        print(note, file=sys.stderr)
    return folder


def check_base(base: str, *, weights: bool = False) -> None:
    """Raise ``ValueError`` for a folder that is no base model, or of a family that megalora does
    not compute; a name on the hub is looked up later.

    Args:
        weights: whether its weights are read, so that all their files must be there.
    """
    # Else the hub would be asked, which takes seconds and needs a network.
    is_path = base.startswith((".", "/", "~")) or Path(base).exists()
    if is_path:
        folder = local_folder(base, "--base", weights=False)
        if weights:
            check_weights(folder)
        else:
            model_shape(read_hf_config(folder))


def check_out(out: Path, source: Path) -> None:
    """Raise ``ValueError`` unless the command may make the folder ``out`` of ``source``."""
    check_new(out.resolve(), source)
