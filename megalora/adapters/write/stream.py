"""Write a safetensors file tensor by tensor: its header first, then each tensor as it comes.

The bytes are those of ``safetensors.torch.save_file``, which needs all tensors at once.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megalora.hf.safetensors import header_bytes

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.uint8: "U8",
}  # fmt: skip
"""Dtypes of what is saved, as the format spells them."""


class TensorFile:
    """A safetensors file that is being written; a context that forces it to disk."""

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Write the header.

        Args:
            tensors: all that the file will have; only shapes and dtypes are read, so that they may
                be on the device "meta".
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        # As save_file: the widest dtype first, so that each tensor begins where its dtype may.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        place = 0
        self._places: dict[str, tuple[int, int]] = {}
        for name in names:
            tensor = tensors[name]
            end = place + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [place, end],
            }
            self._places[name] = (place, end)
            place = end
        begin = header_bytes(header)
        self._first = len(begin)
        self._file = path.open("wb")
        self._file.write(begin)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                # Otherwise the file would have a gap that reads as zeros.
                assert not self._places, f"not written: {sorted(self._places)[:3]}"
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, at its place; each once, in any order."""
        # What is still there at the end was forgotten; a second write of a name finds no place.
        begin, end = self._places.pop(name)
        # As bytes, since numpy has no bfloat16.
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        assert content.numel() == end - begin, f"{name}: {content.numel()} bytes"
        # Tensors come in the order of layers; in the file they lie by dtype and name.
        self._file.seek(self._first + begin)
        self._file.write(memoryview(content.numpy()))


def write_tensors(
    path: Path,
    announced: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a whole file.

    Args:
        announced: as ``TensorFile`` takes them.
        tensors: (name, tensor) of each, made while the file is written.
    """
    with TensorFile(path, announced, metadata) as file:
        for name, tensor in tensors:
            file.write(name, tensor)
