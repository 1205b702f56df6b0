"""Count what a training step asks of the pretended GPU: waits of the host, copies to the device and
kernels, each by the place in the code that asks."""

import contextlib
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.attention.varlen  # registers the operations that ``KERNELS_OF_TORCH`` names

NAME = "gpu"
KERNELS_OF_TORCH = {
    torch.ops.aten._grouped_mm.default: "grouped_mm",
    torch.ops.torch_attn._varlen_attn.default: "flash attention",
    torch.ops.torch_attn._varlen_attn_backward.default: "flash attention, backward",
    torch.ops.aten._fused_adamw_.default: "fused AdamW",
}
"""Operations of torch that are counted among the kernels, with their names in the record; the last
is a kernel for about 30 tensors each."""


def _folder(package: str) -> str:
    """The folder of a package, found without importing it: nothing may be imported before the
    device is installed."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    return f"{Path(spec.origin).parent}/"


OWNERS = {
    _folder("megalora_kernels"): "megalora_kernels",
    _folder("megalora"): "megalora",
    _folder("megatron.core"): "megatron/core",
}
"""Whose code a wait is put down to: the innermost frame from a file in one of these folders, by the
name it is listed under. Whole paths, because a virtual environment may itself lie in a folder
called megalora."""


def on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


class Recorder:
    """Counts waits of the host, copies to the device and kernels, by place, in one phase after the
    other."""

    def __init__(self) -> None:
        self.waits: dict[str, Counter[str]] = {}
        self.copies: dict[str, Counter[str]] = {}
        self.kernels: dict[str, Counter[str]] = {}
        self.now: str | None = None
        self.answers: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {}
        """What the device would hold where a function of this name reads it; elsewhere ones."""
        self.pinned: set[int] = set()
        """Storages of page-locked host memory."""
        self.on_launch: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None
        """Called with every Triton kernel that is launched and its arguments."""

    def forget(self) -> None:
        self.waits = {}
        self.copies = {}
        self.kernels = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside under ``name``; what happens outside any phase is not
        counted."""
        for counters in (self.waits, self.copies, self.kernels):
            counters.setdefault(name, Counter())
        self.now = name
        try:
            yield
        finally:
            # A scenario may raise inside; the next one must not count under its name.
            self.now = None

    def wait(self, kind: str) -> None:
        """The host waits for the device here."""
        if self.now is not None:
            self.waits[self.now][f"{kind}: {place()}"] += 1

    def copy_to_device(self, source: torch.Tensor, non_blocking: bool) -> None:
        """Count a copy, and the wait that goes with it unless the source is page-locked and the
        copy does not block."""
        if self.now is not None:
            self.copies[self.now][place()] += 1
        # CUDA first moves pageable memory into a page-locked buffer of its own, and the host waits
        # for that even where the call says non_blocking.
        if source.untyped_storage()._cdata not in self.pinned:
            self.wait("copy from pageable memory")
        elif not non_blocking:
            self.wait("blocking copy to the device")

    def kernel(self, name: str) -> None:
        if self.now is not None:
            self.kernels[self.now][name] += 1


def place() -> str:
    """``file:function`` of the innermost frame of our code or Megatron's; "torch" where there is
    none."""
    # Walking the frames by hand reads no source lines; inspect.stack would, for each of the
    # thousands of operations of a step.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for folder, owner in OWNERS.items():
            if path.startswith(folder):
                # The qualified name tells methods of two classes in one file apart.
                return f"{owner}/{path.removeprefix(folder)}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "torch"


def print_and_end(found: Any) -> NoReturn:
    """Print what was found as JSON, and end the process at once.

    Where a process group and the pretended device have been used, the interpreter's own way out
    now and then (2 of 75 processes) destroys a thread of C++ that still runs, and aborts.
    """
    json.dump(found, sys.stdout, indent=1)
    sys.stdout.flush()
    os._exit(0)
