"""Folders for tests of the account of tensors, and what it refuses of them."""

from pathlib import Path

import pytest

from megalora.model.account import open_folder


def copy_of(base: Path, out: Path) -> Path:
    out.mkdir()
    for path in base.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_folder(folder)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)
