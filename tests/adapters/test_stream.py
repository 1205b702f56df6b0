"""Write a safetensors file tensor by tensor: the bytes of safetensors' own writer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megalora.adapters.write.stream import TensorFile, write_tensors


def test_the_bytes_are_those_of_save_file(tmp_path: Path) -> None:
    tensors = {
        # Widths of one, two and four bytes, with odd numbers of elements.
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(7).bfloat16(),
        "c": torch.arange(11, dtype=torch.uint8),
        "a.bias": torch.randn(1, 3).bfloat16(),
        "ä": torch.randn(2, 2).half(),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    announced = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
    # In another order than the file's.
    write_tensors(tmp_path / "ours", announced, reversed(tensors.items()), {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_that_was_announced_must_come(tmp_path: Path) -> None:
    announced = {"a": torch.zeros(3), "b": torch.zeros(2)}
    with pytest.raises(AssertionError, match="not written"):
        write_tensors(tmp_path / "one", announced, [("a", torch.zeros(3))], {})
    with (
        pytest.raises(AssertionError, match="12 bytes"),
        TensorFile(tmp_path / "two", announced, {}) as file,
    ):
        file.write("b", torch.zeros(3))
