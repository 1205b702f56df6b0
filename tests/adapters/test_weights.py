"""Find an adapter's tensors: one file, shards and pickles are read alike, and what is no file is
named."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalora.adapters.files import CONFIG, WEIGHTS, NotAnAdapter
from megalora.adapters.read.weights import PICKLE, AdapterWeights
from megalora.cli import main as cli
from megalora.serve.check import check_adapter
from megalora.serve.errors import AdapterInvalid, AdapterNotFound
from tests.adapters.adapters import Trained
from tests.adapters.stock import check_equal, loaded_by_peft
from tests.adapters.weight_files import in_pickle, in_shards, pipe, save_as
from tests.named_tensors import assert_same_tensors

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")
# Forms that PEFT and transformers have written over the years.
WAYS: dict[str, Callable[[Path], None]] = {
    "pickle": in_pickle,
    "pickle of torch before 1.6": lambda folder: in_pickle(
        folder, _use_new_zipfile_serialization=False
    ),
    "shards": in_shards,
    "shards without an index": lambda folder: in_shards(folder, index=False),
    "pickled shards": lambda folder: in_shards(folder, "bin"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_adapter_in_another_file(stored: Trained, way: str) -> None:
    """Value for value as PEFT reads the single file."""
    expected = loaded_by_peft(stored.folder, stored.base)
    before = load_file(stored.folder / WEIGHTS)
    WAYS[way](stored.folder)
    read = check_equal(stored.folder, stored.base, expected)
    assert_same_tensors(read.tensors, before)


@pytest.mark.parametrize("way", ["pickle", "shards"])
def test_every_command_reads_it(
    stored: Trained, tmp_path: Path, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    WAYS[way](stored.folder)
    adapter = str(stored.folder)
    base = str(stored.base)
    out = str(tmp_path / "out")
    cli.main(["inspect", adapter])
    # Name, rank, out x in, layers: 6 heads of 32 at a hidden size of 96.
    assert "q_proj           2        192 x 96       4" in capfd.readouterr().out
    cli.main(["import", adapter, f"{out}/imported", "--base", base])
    cli.main(["export", adapter, f"{out}/exported", "--base", base])
    cli.main(["merge", adapter, "--base", base, "--out", f"{out}/merged"])
    # 4 layers with q and 3 projections of 8 experts each.
    assert "100 modules" in capfd.readouterr().out
    for folder in ("imported", "exported"):
        again = load_file(tmp_path / "out" / folder / WEIGHTS)
        for name, tensor in stored.tensors.items():
            assert torch.equal(again[name], tensor), name


def test_the_file_that_peft_prefers_is_read(stored: Trained) -> None:
    # A pickle beside the safetensors file, as an older run into the same folder left it.
    torch.save({"x": torch.ones(2, 2)}, stored.folder / PICKLE)
    weights = AdapterWeights(stored.folder)
    assert "x" not in weights.info
    assert weights.notes == [
        f"{stored.folder / PICKLE} was not read: PEFT loads {WEIGHTS} where both are there"
    ]


def test_pipes_and_folders_are_no_files(stored: Trained) -> None:
    """Opening a pipe waits for a writer; no signal ends that in a library."""
    pipe(WEIGHTS)(stored.folder)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is not a regular file but a pipe"):
        AdapterWeights(stored.folder)
    with pytest.raises(AdapterInvalid, match="is not a regular file"):
        check_adapter(stored.folder)
    # A folder of that name, as a careless copy makes it.
    (stored.folder / WEIGHTS).unlink()
    (stored.folder / WEIGHTS).mkdir()
    with pytest.raises(ValueError, match="is not a regular file"):
        AdapterWeights(stored.folder)
    pipe(CONFIG)(stored.folder)
    with pytest.raises(NotAnAdapter, match=f"has no {CONFIG}"):
        AdapterWeights(stored.folder)


def test_folders_around_adapters_name_them(stored: Trained, tmp_path: Path) -> None:
    # The folder above an adapter is easily given in its place.
    outer = tmp_path / "outer"
    outer.mkdir()
    stored.folder.rename(outer / "math")
    with pytest.raises(
        NotAnAdapter, match=f"^{outer} is not an adapter folder: .* give {outer / 'math'}$"
    ):
        AdapterWeights(outer)
    with pytest.raises(AdapterNotFound, match=f"give {outer / 'math'}$"):
        check_adapter(outer)
    # With several adapters in it, none is meant.
    for name in ("code", "poems"):
        (outer / name).mkdir()
        (outer / name / CONFIG).write_text("{}")
    with pytest.raises(
        NotAnAdapter, match=r"but 3 of its sub-folders have: code, math, poems. Give one of them$"
    ):
        AdapterWeights(outer)
    with pytest.raises(NotAnAdapter, match="is a file; name the folder that it lies in"):
        AdapterWeights(outer / "math" / WEIGHTS)
    with pytest.raises(NotAnAdapter, match="is not a folder"):
        AdapterWeights(outer / "nowhere")


def test_other_files_are_named(stored: Trained) -> None:
    (stored.folder / WEIGHTS).rename(stored.folder / "adapter_model.pt")
    with pytest.raises(NotAnAdapter, match=f"it has no {WEIGHTS}, but adapter_model.pt$"):
        AdapterWeights(stored.folder)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_rows_are_the_tensor(tmp_path: Path, form: str) -> None:
    """What NumPy sees of every dtype is what torch sees, also beyond one block of rows."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        # Rows are read in blocks of 4096: two for the matrix, one for the vector.
        tensors[f"{dtype}"] = torch.randn(5000, 3, generator=generator).to(dtype)
        tensors[f"{dtype} vector"] = torch.randn(7, generator=generator).to(dtype)
    (tmp_path / CONFIG).write_text("{}")
    save_as(form, tensors, tmp_path / f"adapter_model.{form}")
    weights = AdapterWeights(tmp_path)
    for name, tensor in tensors.items():
        blocks = list(weights.rows(name))
        assert len(blocks) == (2 if tensor.dim() == 2 else 1)
        # float64 holds every value of the narrower dtypes.
        np.testing.assert_array_equal(np.concatenate(blocks), tensor.double().numpy())
        assert weights.info[name].shape == tuple(tensor.shape)
        assert torch.equal(weights.tensor(name), tensor)
    assert weights.not_finite() is None


def test_headers_are_read_without_torch(stored: Trained) -> None:
    """A server's client checks adapters; importing torch would take seconds."""
    # A process of its own, because this one has torch. 100 modules have an A and a B each.
    code = f"""
import sys
from pathlib import Path
from megalora.adapters.read.weights import AdapterWeights

weights = AdapterWeights(Path({str(stored.folder)!r}))
assert weights.not_finite() is None
assert len(weights.info) == 200
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
