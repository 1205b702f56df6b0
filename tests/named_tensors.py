"""Change tensors by name, as safetensors files hold them, to spoil or rewrite a file, and compare
them bit for bit."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

type Tensors = dict[str, Tensor]
type Change = Callable[[Tensors], Tensors]
"""What a file shall hold instead of the tensors it holds, by name."""


def without(*names: str) -> Change:
    """Remove the tensors of these names."""

    def change(tensors: Tensors) -> Tensors:
        # A copy: the caller's own tensors stay as they were for its comparison.
        kept = dict(tensors)
        for name in names:
            kept.pop(name, None)
        return kept

    return change


def only_parts(*parts: str) -> Change:
    """Keep the tensors whose names contain one of ``parts``."""

    def change(tensors: Tensors) -> Tensors:
        kept = {}
        for name, tensor in tensors.items():
            if any(part in name for part in parts):
                kept[name] = tensor
        return kept

    return change


def without_parts(*parts: str) -> Change:
    """Remove the tensors whose names contain one of ``parts``."""

    def change(tensors: Tensors) -> Tensors:
        removed = only_parts(*parts)(tensors)
        return without(*removed)(tensors)

    return change


def renamed(name_of: Callable[[str], str]) -> Change:
    """Give every tensor the name that ``name_of`` makes of its own."""

    def change(tensors: Tensors) -> Tensors:
        return {name_of(name): tensor for name, tensor in tensors.items()}

    return change


def cast(dtype: torch.dtype) -> Change:
    """Give every tensor another dtype."""

    def change(tensors: Tensors) -> Tensors:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    return change


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and the same numbers bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
