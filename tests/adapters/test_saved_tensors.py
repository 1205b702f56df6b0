"""Read what two ranks saved at any layout, and a checkpoint of an earlier version; refuse what is
not whole."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalora.adapters.files import INDEX, STATE, STATE_KEYS
from megalora.adapters.saved_tensors import SavedTensors, digest_fault
from megalora.adapters.state_index import Index, Indexed, Piece, rank_file, write_index
from megalora.lora.slices import Slice
from megalora.train.checkpoint.pieces import Block
from megalora.train.checkpoint.snapshot import Snapshot

FORMAT_1 = Path(__file__).parents[1] / "train/format_1/step_000002"
SHAPE = (4, 6)
COLUMNS = [Slice(SHAPE, 1, 2, 0, 0, 12), Slice(SHAPE, 1, 2, 1, 0, 12)]


def values_of(key: str) -> Tensor:
    return torch.arange(24.0).view(SHAPE) + 100 * STATE_KEYS.index(key)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two ranks, each with half of the columns of ``a``; the second has all of ``b``."""
    (tmp_path / STATE).mkdir()
    files: dict[str, tuple[int, str]] = {}
    for rank, part in enumerate(COLUMNS):
        blocks: list[Block] = []
        for key in STATE_KEYS:
            half = values_of(key).chunk(2, 1)[rank].flatten()
            pieces = [("a", part)]
            if rank == 1:
                half = torch.cat([half, torch.full((5,), 7.0)])
                pieces.append(("b", Slice.whole((5,))))
            blocks.append(Block(key, half, tuple(pieces)))
        snapshot = Snapshot()
        snapshot.take(blocks, {"cpu": torch.full((3,), rank, dtype=torch.uint8)})
        files[rank_file(rank)] = snapshot.write(tmp_path / STATE / rank_file(rank))
    pieces = tuple(Piece(rank, part) for rank, part in enumerate(COLUMNS))
    tensors = {
        "a": Indexed(SHAPE, STATE_KEYS, pieces),
        "b": Indexed((5,), STATE_KEYS, (Piece(1, Slice.whole((5,))),)),
    }
    write_index(tmp_path / INDEX, Index(2, files, tensors))
    return tmp_path


@pytest.mark.parametrize("key", STATE_KEYS)
def test_any_layout_reads_its_part(folder: Path, key: str) -> None:
    whole = values_of(key)
    with SavedTensors(folder) as saved:
        for dim, count in ((None, 1), (0, 2), (0, 4), (1, 2), (1, 3)):
            for shard in range(count):
                part = whole if dim is None else whole.chunk(count, dim)[shard]
                part = part.flatten()
                for start, end in ((0, len(part)), (1, 4), (len(part) - 2, len(part))):
                    wanted = Slice(SHAPE, dim, count, shard, start, end)
                    assert torch.equal(saved.read(key, "a", wanted), part[start:end]), wanted
        assert torch.equal(saved.whole(key, "a", SHAPE), whole)
        assert saved.generators(1)["cpu"].tolist() == [1, 1, 1]


def test_only_files_that_have_something_are_opened(folder: Path) -> None:
    with SavedTensors(folder) as saved:
        # The other rank's file is gone: nothing of it is needed.
        (folder / STATE / rank_file(0)).unlink()
        saved.read("param", "a", COLUMNS[1].part(2, 9))
        saved.whole("exp_avg", "b", (5,))
        with pytest.raises(ValueError, match="rank_00000.safetensors: not a readable"):
            saved.whole("param", "a", SHAPE)


def test_a_tensor_of_another_adapter_is_refused(folder: Path) -> None:
    with SavedTensors(folder) as saved:
        with pytest.raises(ValueError, match=r"index.json has no tensor param.c; it was made with"):
            saved.whole("param", "c", SHAPE)
        with pytest.raises(ValueError, match=r"a is \(4, 6\), which does not fit this run's model"):
            saved.whole("param", "a", (6, 4))


def test_a_changed_byte_is_found(folder: Path) -> None:
    with SavedTensors(folder) as saved:
        assert saved.index is not None
        name = rank_file(1)
        assert digest_fault(folder, saved.index, name) is None
        path = folder / STATE / name
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)
        assert "its SHA-256 is not the one in" in str(digest_fault(folder, saved.index, name))
        path.write_bytes(content[:-1])
        assert "bytes, and index.json says" in str(digest_fault(folder, saved.index, name))


def _piece(index: dict[str, Any], number: int) -> list[Any]:
    return index["tensors"]["a"]["pieces"][number]


# Rows of a piece are [rank, dim, num_shards, shard, start, end].
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an element missing": (lambda i: _piece(i, 1).__setitem__(5, 11), "elements 23 to 23"),
    "a piece missing": (lambda i: i["tensors"]["a"]["pieces"].pop(), "are in no piece"),
    "a piece twice": (
        lambda i: i["tensors"]["a"]["pieces"].append(_piece(i, 0)), "is in two pieces",
    ),
    "another version's": (lambda i: i.update(format=3), "format 3; this version"),
    "a rank that is not there": (lambda i: _piece(i, 0).__setitem__(0, 2), "is damaged: a is"),
    "a path as a file": (lambda i: i["files"].update({"../x": [1, ""]}), "is damaged: files is"),
    "a number as text": (lambda i: _piece(i, 0).__setitem__(4, "0"), "is damaged: a is"),
    "a key more": (lambda i: i["tensors"]["a"].update(dtype="F32"), "is damaged: a is"),
    "no shape": (lambda i: i["tensors"]["a"].update(shape=None), "is damaged: a is"),
    "no ranks": (lambda i: i.update(world_size=None), "is damaged: world_size is None"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_is_not_whole_is_refused(folder: Path, change: str) -> None:
    do, message = CHANGES[change]
    index = json.loads((folder / INDEX).read_text())
    do(index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        SavedTensors(folder)


def test_format_1_is_read() -> None:
    """Saved by the version before this format."""
    theirs = load_file(FORMAT_1 / "training_state/optimizer.safetensors")
    average = load_file(FORMAT_1 / "training_state/average.safetensors")
    assert len(theirs) == 12 and len(average) == 4
    with SavedTensors(FORMAT_1) as saved:
        for key, of_key in (("average", average), *((key, None) for key in STATE_KEYS)):
            prefix = f"{key}."
            for name, value in (of_key or theirs).items():
                if of_key is None and not name.startswith(prefix):
                    continue
                # A's columns are cut where the linear is row-parallel; any cut will do here.
                part = Slice(tuple(value.shape), 1, 2, 1, 1, math.prod(value.shape) // 2)
                ours = saved.read(key, name.removeprefix(prefix), part)
                assert torch.equal(ours, value.chunk(2, 1)[1].flatten()[1:]), name
        assert sorted(saved.names("average")) == sorted(average)
