"""Change the files of adapter folders, and compare their tensors."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.files import CONFIG, WEIGHTS, read_config
from megalora.lora.spec import tensor_name
from tests.named_tensors import Change, assert_same_tensors, without_parts


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of ``adapter_config.json``; ``...`` removes one."""
    config = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Change) -> None:
    """Replace the tensors of the adapter file by ``change`` of them."""
    changed = change(load_file(folder / WEIGHTS))
    # safetensors refuses two names of one tensor, and views.
    copies = {name: tensor.clone().contiguous() for name, tensor in changed.items()}
    save_file(copies, folder / WEIGHTS)


def remove_tensors(folder: Path, part: str) -> None:
    """Remove every tensor whose name contains ``part``."""
    edit_tensors(folder, without_parts(part))


def assert_same_files(one: Path, other: Path) -> None:
    """Two adapter folders with the same config, and the same tensors bit for bit."""
    assert read_config(one) == read_config(other)
    assert_same_tensors(load_file(one / WEIGHTS), load_file(other / WEIGHTS))


def factors_of(tensors: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of one linear: its own, or the one that experts share."""
    found = []
    for factor in ("A", "B"):
        name = tensor_name(module, factor)
        if name not in tensors:
            name = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        found.append(tensors[name])
    return found[0], found[1]


def refused(call: Callable[[], Any]) -> str:
    """What ``call`` refuses with, which is one line."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    # Commands print it behind their own name; a name or a value from a file must not break it.
    assert "\n" not in message
    return message
