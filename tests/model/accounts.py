"""Copy base folders, and return what the account of tensors says of a spoiled one."""

from pathlib import Path

import pytest

from megalora.model.account import open_folder


def copy_of(base: Path, out: Path) -> Path:
    """A copy that a test may spoil; ``base`` is shared by all tests of a module."""
    out.mkdir()
    for path in base.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def refusal(folder: Path) -> str:
    """The message of the account, which must be a user's error and one line."""
    with pytest.raises(ValueError) as caught:
        open_folder(folder)
    # JSONDecodeError and UnicodeDecodeError are ValueErrors too, but name no file.
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)
