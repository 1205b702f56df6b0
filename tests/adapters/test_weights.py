"""Where an adapter's tensors lie: single files, shards and pickles are read alike; what is missing,
torn or no file is named."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.files import CONFIG, WEIGHTS, NotAnAdapter
from megalora.adapters.read.weights import PICKLE, AdapterWeights
from megalora.cli import main as cli
from megalora.serve.check import check_adapter
from megalora.serve.errors import AdapterInvalid, AdapterNotFound
from tests.adapters.adapters import EXPERTS, Trained, train
from tests.adapters.stock import check_equal, loaded_by_peft
from tests.named_tensors import assert_same_tensors

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")
SHARDS = [f"adapter_model-0000{n}-of-00003" for n in (1, 2, 3)]
INDEX = "adapter_model.safetensors.index.json"


@pytest.fixture
def trained(bases: dict[str, Path], tmp_path: Path) -> Trained:
    return train(
        bases["moe"], tmp_path / "adapter", rank=2, alpha=6.0, target_modules=[*EXPERTS, "q_proj"]
    )


def in_pickle(folder: Path, **options: object) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE, **options)
    (folder / WEIGHTS).unlink()


def in_shards(folder: Path, form: str = "safetensors", *, index: bool = True) -> None:
    """Every third tensor together, so that an A and its B are apart."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    # Names are sorted: an A and its B are neighbours, and so in different shards.
    for at, shard in enumerate(SHARDS):
        part = {name: tensors[name] for name in names[at::3]}
        weight_map |= dict.fromkeys(part, f"{shard}.{form}")
        (save_file if form == "safetensors" else torch.save)(part, folder / f"{shard}.{form}")
    if index:
        (folder / f"adapter_model.{form}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    (folder / WEIGHTS).unlink()


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
def test_the_same_adapter_in_another_file(trained: Trained, way: str) -> None:
    """Value for value as PEFT reads the single file."""
    expected = loaded_by_peft(trained.folder, trained.base)
    before = load_file(trained.folder / WEIGHTS)
    WAYS[way](trained.folder)
    read = check_equal(trained.folder, trained.base, expected)
    assert_same_tensors(read.tensors, before)


@pytest.mark.parametrize("way", ["pickle", "shards"])
def test_every_command_reads_it(
    trained: Trained, tmp_path: Path, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    WAYS[way](trained.folder)
    adapter = str(trained.folder)
    base = str(trained.base)
    out = str(tmp_path / "out")
    cli.main(["inspect", adapter])
    # Name, rank, out x in, layers.
    assert "q_proj           2        192 x 96       4" in capfd.readouterr().out
    cli.main(["import", adapter, f"{out}/imported", "--base", base])
    cli.main(["export", adapter, f"{out}/exported", "--base", base])
    cli.main(["merge", adapter, "--base", base, "--out", f"{out}/merged"])
    assert "100 modules" in capfd.readouterr().out
    for folder in ("imported", "exported"):
        again = load_file(tmp_path / "out" / folder / WEIGHTS)
        for name, tensor in trained.tensors.items():
            assert torch.equal(again[name], tensor), name


def test_a_server_gets_what_was_checked(trained: Trained, tmp_path: Path) -> None:
    """vLLM would unpickle, and knows no shards: megalora checks, copies and serves one form."""
    in_pickle(trained.folder)
    with pytest.raises(
        AdapterInvalid,
        match=f"holds {PICKLE}; .* serves {WEIGHTS}, which megalora export {trained.folder} OUT",
    ):
        check_adapter(trained.folder)


def test_the_file_that_peft_prefers_is_read(trained: Trained) -> None:
    # A pickle beside the safetensors file.
    torch.save({"x": torch.ones(2, 2)}, trained.folder / PICKLE)
    weights = AdapterWeights(trained.folder)
    assert "x" not in weights.info
    assert weights.notes == [
        f"{trained.folder / PICKLE} was not read: PEFT loads {WEIGHTS} where both are there"
    ]


class Runs:
    """What a pickle can do to whoever loads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (2, "a pickle that would run posix.mkdir, .* save it again with PEFT"),
        (4, r"\(UnpicklingError: Unsupported operand 149\)"),
    ],
)
def test_a_pickle_runs_no_code(
    trained: Trained, tmp_path: Path, protocol: int, message: str
) -> None:
    (trained.folder / WEIGHTS).unlink()
    with (trained.folder / PICKLE).open("wb") as file:
        # Whoever loads it with pickle makes a folder.
        pickle.dump({"a": Runs(tmp_path / "trace")}, file, protocol)
    with pytest.raises(ValueError, match=message) as caught:
        AdapterWeights(trained.folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "trace").exists()


@pytest.mark.parametrize("length", [0, 1, 100, 5000])
def test_a_pickle_cut_short(trained: Trained, length: int) -> None:
    in_pickle(trained.folder)
    os.truncate(trained.folder / PICKLE, length)
    with pytest.raises(
        ValueError, match=rf"{PICKLE}: not a readable pickle \(.*\); is it cut short"
    ) as caught:
        AdapterWeights(trained.folder)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


BAD_PICKLES: dict[str, tuple[object, str]] = {
    "a list": ([torch.ones(2, 2)], "must hold a dictionary of tensors, holds a list"),
    "a training state": ({"epoch": 3, "state": {"a": torch.ones(2, 2)}},
                         "epoch is a int; an adapter's weights are"),
    "numbers for names": ({1: torch.ones(2, 2)}, "1 is a Tensor; an adapter's"),
    # torch.load returns these as tensors; their bytes are no plain matrix.
    "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "a is not a plain tensor"),
    # 10^12 numbers that are one.
    "a view larger than its storage": ({"a": torch.ones(1).expand(10**9, 10**3)},
                                       "a is larger than its contents"),
    "nothing": ({}, f"{PICKLE} holds no tensors: nothing was adapted"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_a_pickle_of_something_else(trained: Trained, case: str) -> None:
    content, message = BAD_PICKLES[case]
    (trained.folder / WEIGHTS).unlink()
    torch.save(content, trained.folder / PICKLE)
    with pytest.raises(ValueError, match=message):
        AdapterWeights(trained.folder)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def twice(folder: Path) -> None:
    tensors = load_file(folder / f"{SHARDS[0]}.safetensors")
    save_file(
        tensors | load_file(folder / f"{SHARDS[1]}.safetensors"),
        folder / f"{SHARDS[1]}.safetensors",
    )


def pipe(name: str) -> Callable[[Path], object]:
    def put(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return put


BROKEN_SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (
        without(f"{SHARDS[1]}.safetensors"),
        rf"1 of 3 shards are missing \({SHARDS[1]}.safetensors\)",
    ),
    # Which of two sets is the adapter?
    "one too many": (
        lambda f: (f / "adapter_model-00004-of-00003.safetensors").touch(),
        "00004-of-00003.* is not one of 3 shards",
    ),
    "two sets": (
        lambda f: (f / "adapter_model-00001-of-00002.safetensors").touch(),
        "holds weights more than once",
    ),
    "beside a single file": (
        lambda f: save_file({"x": torch.ones(1)}, f / WEIGHTS),
        "holds weights more than once",
    ),
    "a tensor twice": (
        twice,
        rf"is both in {SHARDS[0]}.safetensors and in {SHARDS[1]}.safetensors",
    ),
    # The index and the shards must say the same.
    "a tensor the index lacks": (
        edit_index(dict.popitem),
        "1 tensors are not where it says, .* in None by the index",
    ),
    "a tensor that is nowhere": (
        edit_index(lambda m: m.update(gone=f"{SHARDS[0]}.safetensors")),
        "such as gone: .* None really",
    ),
    "an index of something else": (
        lambda f: (f / INDEX).write_text('{"weight_map": []}'),
        "weight_map must be an object",
    ),
    "a shard cut short": (
        lambda f: os.truncate(f / f"{SHARDS[2]}.safetensors", 1000),
        "is not a whole safetensors file",
    ),
    # What a clone without git-lfs leaves.
    "a pointer of Git LFS": (
        lambda f: (f / f"{SHARDS[1]}.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        "run git lfs pull",
    ),
    "a shard that is a pipe": (pipe(f"{SHARDS[2]}.safetensors"), "is not a regular file"),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_shards(trained: Trained, case: str) -> None:
    change, message = BROKEN_SHARDS[case]
    in_shards(trained.folder)
    change(trained.folder)
    with pytest.raises(ValueError, match=message):
        AdapterWeights(trained.folder)


def test_pipes_and_folders_are_no_files(trained: Trained) -> None:
    """Opening a pipe waits for a writer; no signal ends that in a library."""
    # A pipe that nobody writes to.
    pipe(WEIGHTS)(trained.folder)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is not a regular file but a pipe"):
        AdapterWeights(trained.folder)
    with pytest.raises(AdapterInvalid, match="is not a regular file"):
        check_adapter(trained.folder)
    (trained.folder / WEIGHTS).unlink()
    (trained.folder / WEIGHTS).mkdir()
    with pytest.raises(ValueError, match="is not a regular file"):
        AdapterWeights(trained.folder)
    pipe(CONFIG)(trained.folder)
    with pytest.raises(NotAnAdapter, match=f"has no {CONFIG}"):
        AdapterWeights(trained.folder)


def test_folders_around_adapters_name_them(trained: Trained, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    trained.folder.rename(outer / "math")
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


def test_other_files_are_named(trained: Trained) -> None:
    (trained.folder / WEIGHTS).rename(trained.folder / "adapter_model.pt")
    with pytest.raises(NotAnAdapter, match=f"it has no {WEIGHTS}, but adapter_model.pt$"):
        AdapterWeights(trained.folder)


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
    (save_file if form == "safetensors" else torch.save)(
        tensors, tmp_path / f"adapter_model.{form}"
    )
    weights = AdapterWeights(tmp_path)
    for name, tensor in tensors.items():
        blocks = list(weights.rows(name))
        assert len(blocks) == (2 if tensor.dim() == 2 else 1)
        np.testing.assert_array_equal(np.concatenate(blocks), tensor.double().numpy())
        assert weights.info[name].shape == tuple(tensor.shape) and torch.equal(
            weights.tensor(name), tensor
        )
    assert weights.not_finite() is None


def test_headers_are_read_without_torch(trained: Trained) -> None:
    """A server's client checks adapters; importing torch would take seconds."""
    import subprocess

    code = (
        "import sys; from pathlib import Path; from megalora.adapters.read.weights import"
        f" AdapterWeights\nw = AdapterWeights(Path({str(trained.folder)!r})); assert w.not_finite()"
        " is None and len(w.info) == 200\nassert 'torch' not in sys.modules, sorted(m for m in"
        " sys.modules if 'torch' in m)[:5]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
