"""Read the tensors of an adapter folder by name, each when it is asked for.

Only pickles and ``tensor`` need torch.

    adapter_model.safetensors                          as PEFT writes it
    adapter_model-00001-of-00002.safetensors, ...      as transformers' save_pretrained writes it;
                                                       the index beside them is optional
    adapter_model.bin, adapter_model-00001-of-...bin   PEFT's safe_serialization=False: a pickle, of
                                                       which only tensors are read

Every command reads an adapter through this file, so that what one of them reads or refuses, all do.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from megalora.adapters.files import (
    PART_OF,
    WEIGHTS,
    NotAnAdapter,
    check_adapter_folder,
    check_regular,
)
from megalora.hf.json_file import read_json_object
from megalora.hf.safetensors import read_header
from megalora.wording import first_few

if TYPE_CHECKING:
    from torch import Tensor

PICKLE = "adapter_model.bin"
_SHARD = re.compile(
    r"adapter_model-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<form>safetensors|bin)"
)
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""Dtype of the bytes; bfloat16, which NumPy lacks, as the upper half of a float32."""
FLOATS = tuple(_NUMPY)
"""Dtypes that a factor can have, as safetensors names them."""
BLOCK_ROWS = 4096
"""Rows that are read at once: a tensor of all experts may be larger than memory."""


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32, F16, BF16."""


class AdapterWeights:
    """Tensors of an adapter folder by name, whichever files they are in."""

    def __init__(self, folder: Path) -> None:
        """Read names and shapes.

        Raises:
            NotAnAdapter: there are no weights.
            ValueError: a file is cut short, is missing among its shards, is a pickle of more than
                tensors.
        """
        self.folder = folder
        self.files, self.notes = find_weight_files(folder)
        self.where = self.files[0] if len(self.files) == 1 else folder
        """What messages about all tensors name."""
        self.info: dict[str, TensorInfo] = {}
        self.part_of = ""
        """Names of the folders that are one adapter together, where this is one of them."""
        self._at: dict[str, _Safetensors | _Pickle] = {}
        for path in self.files:
            # Names and shapes alone: a tensor is read when it is asked for.
            file = _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)
            self.part_of = self.part_of or file.part_of
            for name, info in file.info.items():
                if name in self._at:
                    raise ValueError(
                        f"{folder}: {name} is both in {self._at[name].path.name} and in {path.name}"
                    )
                self._at[name] = file
                self.info[name] = info
        _check_index(folder, self.files, {name: file.path.name for name, file in self._at.items()})
        # PEFT loads an empty file without a word, and the adapter then does nothing.
        if not self.info:
            raise ValueError(
                f"{self.where} holds no tensors: nothing was adapted, or saving went wrong"
            )

    @property
    def is_single_safetensors(self) -> bool:
        """Whether PEFT and vLLM find the weights under the name they look for first."""
        return [path.name for path in self.files] == [WEIGHTS]

    def path_of(self, name: str) -> Path:
        return self._at[name].path

    def tensor(self, name: str) -> "Tensor":
        """The whole tensor, on the CPU."""
        return self._at[name].tensor(name)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """The values of a tensor of floats (``FLOATS``), some thousand rows at a time, in float32
        or float64."""
        return self._at[name].rows(name)

    def not_finite(self) -> str | None:
        """Name of the first tensor with a NaN or an infinite number, or None; all must be of
        ``FLOATS``."""
        for name in self.info:
            for block in self.rows(name):
                if not np.isfinite(block).all():
                    return name
        return None


def as_floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of one of ``FLOATS`` as NumPy can compute with them: float64 stays, all else becomes
    float32, exactly."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F64":
        return raw
    return raw.astype(np.float32)


def mapped_rows(path: Path, start: int, shape: tuple[int, ...], dtype: str) -> Iterator[np.ndarray]:
    """The numbers at byte ``start`` of a file, rows of the first dimension a few thousand at a
    time, as floats."""
    if 0 in shape:
        return  # an empty file region cannot be mapped
    stored = np.memmap(path, _NUMPY[dtype], mode="r", offset=start, shape=shape or (1,))
    for first in range(0, stored.shape[0], BLOCK_ROWS):
        yield as_floats(np.asarray(stored[first : first + BLOCK_ROWS]), dtype)


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: Any = None
        try:
            # Says what is wrong with a file that is not whole.
            header, stored = read_header(path)
        except OSError as error:
            raise ValueError(
                f"{path}: not a readable safetensors file ({error}); is it cut short, or still"
                " being written?"
            ) from None
        metadata = header.get("__metadata__")
        self.part_of = str(metadata.get(PART_OF, "")) if isinstance(metadata, dict) else ""
        self._start: dict[str, int] = {}
        self.info: dict[str, TensorInfo] = {}
        for tensor in stored:
            self._start[tensor.name] = tensor.start
            self.info[tensor.name] = TensorInfo(tensor.shape, tensor.dtype)

    def tensor(self, name: str) -> "Tensor":
        # Late: what needs shapes alone does not wait for torch, which takes seconds to import.
        if self._open is None:
            self._open = safe_open(str(self.path), framework="pt")
        return self._open.get_tensor(name)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        info = self.info[name]
        return mapped_rows(self.path, self._start[name], info.shape, info.dtype)


class _Pickle:
    def __init__(self, path: Path) -> None:
        self.path = path
        # A pickle has no metadata.
        self.part_of = ""
        self._tensors = _unpickled(path)
        self.info: dict[str, TensorInfo] = {}
        for name, tensor in self._tensors.items():
            self.info[name] = TensorInfo(tuple(tensor.shape), _safetensors_name(tensor.dtype))

    def tensor(self, name: str) -> "Tensor":
        return self._tensors[name].contiguous()

    def rows(self, name: str) -> Iterator[np.ndarray]:
        import torch

        tensor = self._tensors[name]
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        # A number without dimensions becomes one row.
        for block in tensor.reshape(-1, *tensor.shape[1:]).split(BLOCK_ROWS):
            yield block.to(wide).numpy()


def _safetensors_name(dtype: Any) -> str:
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
    }
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _unpickled(path: Path) -> dict[str, "Tensor"]:
    """The tensors of a pickle. Its instructions can build tensors and dictionaries and nothing else
    (``weights_only``)."""
    import torch

    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch before 1.6 wrote no zip file, which alone can be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    # Bytes of others, run as instructions: what goes wrong in them can be anything.
    except Exception as error:
        raise ValueError(f"{path}: {_what_is_wrong(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: must hold a dictionary of tensors, holds a {type(content).__name__}"
        )
    for name, tensor in content.items():
        # A view of more elements than its storage has would read past the end.
        what = None
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            what = f"a {type(tensor).__name__}"
        elif tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            what = "not a plain tensor"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            what = "larger than its contents"
        if what:
            raise ValueError(
                f"{path}: {name} is {what}; an adapter's weights are a dictionary of plain tensors"
                " by name"
            )
    return {name: tensor.detach() for name, tensor in content.items()}


def _what_is_wrong(error: Exception) -> str:
    """Say in a line why torch did not load a pickle; its advice to load it without ``weights_only``
    is left out."""
    # torch names what the pickle would call: "Unsupported global: GLOBAL os.system ...".
    text = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", text)
    if code:
        return (
            f"a pickle that would run {code[1]}, and megalora reads pickles of tensors alone. If"
            f" you trust it, load it and save it again with PEFT, which writes {WEIGHTS}"
        )
    detail = re.search(r"WeightsUnpickler error:\s*(.+)", text) or re.search(
        r"(?!.*[Ww]eights.only)(.+)", text
    )
    more = f": {detail[1].strip()[:100]}" if detail else ""
    return (
        f"not a readable pickle ({type(error).__name__}{more}); is it cut short, or of more than"
        " tensors?"
    )


def find_weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files to read, and lines about what lies beside them: the file that PEFT looks for first,
    else a set of shards.

    Raises:
        NotAnAdapter: there is none.
        ValueError: weights are there more than once, a shard is missing, or a file is none.
    """
    check_adapter_folder(folder)
    there = {path.name for path in folder.iterdir()}
    single = [name for name in (WEIGHTS, PICKLE) if name in there]
    # (suffix, number of shards that the name says) -> names
    shards: dict[tuple[str, int], list[str]] = {}
    for name in sorted(there):
        if match := _SHARD.fullmatch(name):
            shards.setdefault((match["form"], int(match["count"])), []).append(name)
    # Either may be the one that is meant. PEFT's own two forms are an exception: it has a rule.
    if (shards and single) or len(shards) > 1:
        names = single + [of_set[0] for of_set in shards.values()]
        raise ValueError(
            f"{folder} holds weights more than once ({', '.join(names)}); leave only those that are"
            " meant"
        )
    notes = []
    if single:
        paths = [folder / single[0]]
        if len(single) > 1:
            notes.append(
                f"{folder / PICKLE} was not read: PEFT loads {WEIGHTS} where both are there"
            )
    elif shards:
        (form, count), names = next(iter(shards.items()))
        paths = _all_shards(folder, form, count, names)
    else:
        # Such as adapter_model.gguf: named, so that the user sees what was found.
        other = sorted(name for name in there if name.startswith("adapter_model"))
        but = f", but {', '.join(other)}" if other else ""
        raise NotAnAdapter(f"{folder} is not an adapter folder: it has no {WEIGHTS}{but}")
    for path in paths:
        check_regular(path)
    return paths, notes


def _all_shards(folder: Path, form: str, count: int, names: list[str]) -> list[Path]:
    """Paths of all shards of a set; raises ``ValueError`` unless ``names`` are just these."""
    expected = []
    for number in range(1, count + 1):
        expected.append(f"adapter_model-{number:05d}-of-{count:05d}.{form}")
    if surplus := [name for name in names if name not in expected]:
        raise ValueError(
            f"{folder}: {surplus[0]} is not one of {count} shards; leave only those that are meant"
        )
    if missing := [name for name in expected if name not in names]:
        raise ValueError(
            f"{folder}: {len(missing)} of {count} shards are missing ({first_few(missing)});"
            " download the adapter again"
        )
    return [folder / name for name in expected]


def _check_index(folder: Path, files: list[Path], found: dict[str, str]) -> None:
    """Raise ``ValueError`` where the index beside shards says otherwise than they do. ``found``:
    tensor -> file."""
    # A single file needs none, and an index beside it is left over.
    path = folder / f"adapter_model{files[0].suffix}.index.json"
    if len(files) == 1 or not path.is_file():
        return
    said = read_json_object(path).get("weight_map")
    if not isinstance(said, dict):
        raise ValueError(f"{path}: weight_map must be an object that names a file for each tensor")
    names = said.keys() | found.keys()
    apart = [name for name in names if said.get(name) != found.get(name)]
    if apart:
        name = min(apart)
        raise ValueError(
            f"{path}: {len(apart)} tensors are not where it says, such as {name}: in"
            f" {said.get(name)} by the index, in {found.get(name)} really; a shard was lost or"
            " replaced. Download or save the adapter again"
        )
