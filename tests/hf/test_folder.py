"""Refuse a base folder whose weights did not arrive whole, with the file's name, before any of them
is read."""

import re
from pathlib import Path

import pytest

from megalora.hf.folder import check_base_folder
from megalora.tiny import make_tiny


def test_a_whole_folder_passes_and_a_truncated_shard_does_not(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "base")
    check_base_folder(folder)
    # The second of several: that the first is whole says nothing about the others.
    shard = sorted(folder.glob("*.safetensors"))[1]
    # The header stays and promises 100 bytes more than there are, as after a broken download.
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=re.escape(f"{shard} is not a whole safetensors file (")):
        check_base_folder(folder)


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "base")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    with pytest.raises(ValueError, match=re.escape(str(index))):
        check_base_folder(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "base")
    index = folder / "model.safetensors.index.json"
    # A downloaded folder must not make us read files that its user did not name.
    index.write_text('{"weight_map": {"lm_head.weight": "../other/model.safetensors"}}')
    with pytest.raises(ValueError) as caught:
        check_base_folder(folder)
    assert (
        str(caught.value)
        == f"{index} names '../other/model.safetensors', which is not in its folder"
    )
