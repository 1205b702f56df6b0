"""Share the smallest config that is accepted, and what is said of one that is not."""

from pathlib import Path

import pytest

from megalora.config.file import load_config

MINIMAL = """\
model: {path: models/tiny}
data: {train: chats.jsonl}
train: {steps: 3}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    # Subclasses such as UnicodeDecodeError have messages of their own, without the file's name.
    assert type(caught.value) is ValueError
    return str(caught.value)
