"""Count the bytes of live tensors while code runs, and their peak, for devices whose allocator does
not count.

Every operation below autograd passes a dispatch mode, in forward, in backward (autograd runs it in
the calling thread on the CPU), inside custom autograd functions, in optimizers and in collectives.
A storage counts from the operation that returns it until the last tensor on it is gone, once
however many views it has. Not seen: what one operation allocates and frees inside (a GPU's
allocator sees that), and storages resized or made without an operation (``UntypedStorage.resize_``,
``torch.from_numpy``).
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors among an operation's arguments or results, which nest in lists, tuples and dicts."""
    # By hand: torch's pytree, which looks up each type in a table, took most of a counted step.
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


class LiveTensors(TorchDispatchMode):
    """``with LiveTensors(already) as live: ...``, then ``live.peak_bytes``.

    Holds weak references alone, so nothing lives longer for being counted. Storages that were there
    before count if a tensor of ``already`` is on them; others are told apart by their first
    appearance as an argument, and only ``unknown_bytes`` has them.
    """

    def __init__(self, already: Iterable[Tensor] = (), *, without_data: bool = False) -> None:
        """``already``: tensors there before, such as parameters and gradient buffers; views of one
        storage count once. ``without_data``: count fake tensors, with the bytes that real ones
        would have."""
        super().__init__()
        self.without_data = without_data
        self.now_bytes = self.peak_bytes = 0
        """Bytes of all counted storages now, and their peak since the start or ``reset_peak``."""
        self.unknown_bytes = 0
        """Bytes of live storages that are not in ``already`` and that no operation made."""
        self._counted: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}
        self._unknown: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}
        for tensor in already:
            self._count(tensor)

    def reset_peak(self) -> None:
        """Let the peak start again from what is live now."""
        self.peak_bytes = self.now_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # torch.tensor hands its result to lift_fresh: it was made just before, without an
        # operation, and counts as this one's result below.
        is_new = func is torch.ops.aten.lift_fresh.default
        if not is_new:
            for tensor in _tensors_in((args, kwargs)):
                if id(tensor.untyped_storage()) not in self._counted:
                    self._note_unknown(tensor.untyped_storage())
        result = func(*args, **kwargs)
        for tensor in _tensors_in(result):
            self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once however many tensors are on it."""
        # A storage's object stays the same one as long as the storage lives, so its id names it
        # until its reference dies.
        storage = tensor.untyped_storage()
        key = id(storage)
        num_bytes = storage.nbytes()
        if key in self._unknown or not self._takes_memory(storage):
            return
        if key in self._counted:
            reference, counted = self._counted[key]
        else:
            reference = weakref.ref(storage, lambda _: self._gone(key))
            counted = 0
        self._counted[key] = (reference, num_bytes)
        # Not 0 for a storage that is known already if resize_ or out= has changed its size.
        self.now_bytes += num_bytes - counted
        # What an operation frees goes after its result came: the peak has both.
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _takes_memory(self, storage: UntypedStorage) -> bool:
        """A meta tensor has a size but no memory; the storage of a fake one is as a meta
        tensor's."""
        return self.without_data or storage.device.type != "meta"

    def _gone(self, key: int) -> None:
        self.now_bytes -= self._counted.pop(key)[1]

    def _note_unknown(self, storage: UntypedStorage) -> None:
        key = id(storage)
        if key not in self._unknown and self._takes_memory(storage):
            reference = weakref.ref(storage, lambda _: self._forget(key))
            self._unknown[key] = (reference, storage.nbytes())
            self.unknown_bytes += storage.nbytes()

    def _forget(self, key: int) -> None:
        self.unknown_bytes -= self._unknown.pop(key)[1]
