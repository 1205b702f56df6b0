"""Measure what a noisy machine cannot change of a call: calls, bytes allocated, moved and kept."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megalora_kernels import Routing
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def calls_and_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """(aten calls, bytes allocated) of one call, the second: the first may set things up."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    calls = 0
    allocated = 0
    for event in recorded.key_averages():
        calls += event.count
        # An operation that frees more than it allocates counts as negative; only what is asked for
        # matters here.
        allocated += max(event.self_cpu_memory_usage, 0)
    return calls, allocated


def kept_bytes(call: Callable[[], object], given: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that a call keeps for backward, each storage once, without those of the tensors
    given."""
    storages: dict[int, int] = {}
    alive = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        alive.append(t)  # keeps the address from being given out twice
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = call()
    # Parameters and inputs would be in memory without this call as well.
    for t in given:
        storages.pop(t.untyped_storage().data_ptr(), None)
    del out
    alive.clear()
    return sum(storages.values())


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Addresses of storages, which views of one tensor share."""
    return {t.untyped_storage().data_ptr() for t in tensors}


class Recorder(TorchDispatchMode):
    """Every new storage an operation returns (as a byte count), and every storage an operation
    reads.

    Triton's interpreter wraps operands of kernels anew, so those that were there before are
    given."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.alive: list[torch.Tensor] = []
        self.allocated: dict[int, int] = {}
        self.read: set[int] = set()
        self.given = _storages(given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inputs before outputs: an operation in place returns a storage that is not new.
        self.read |= _storages(_tensors((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            if t.untyped_storage().data_ptr() not in self.read | self.given:
                self.alive.append(t)  # keeps the address from being given out twice
                self.allocated[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return out

    def at_least(self, num_elements: int, itemsize: int = 4) -> list[int]:
        return [size for size in self.allocated.values() if size >= num_elements * itemsize]


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, were there no cache: every input once, every output
    once, views nothing."""

    WRITE_ONLY = ("copy_", "zero_", "fill_")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        # A view's result aliases an argument that is not written; empty touches no memory.
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if is_view or "empty" in name:
            return out
        if name in self.WRITE_ONLY:
            # The first argument is overwritten without being read, as ``out`` is below.
            read = args[1:]
        else:
            kwargs.pop("out", None)
            read = (args, kwargs)
        for t in _tensors(read) + _tensors(out):
            self.bytes += t.numel() * t.element_size()
        return out


class _Sized(TorchDispatchMode):
    """Refuses operations whose result's shape is a value: on a GPU they wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        # repeat_interleave sums its counts on the host unless it is told the result's size.
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        assert not unsized and name not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
        ), name
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads_on_the_host() -> Iterator[None]:
    """Whatever would make the host wait for a device raises."""

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor is read on the host")

    with pytest.MonkeyPatch.context() as patch, _Sized():
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        patch.setattr(Routing, "spans", refuse)
        # On CPU grouped_mm checks offsets, where reading them costs nothing; on a GPU it does not.
        patch.setattr(Routing, "bounds", property(lambda self: None))
        yield
