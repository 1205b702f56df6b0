"""Bytes of live tensors while a piece of code runs, and their peak: an allocator's counters for
devices that have none.

Every operation below autograd passes a dispatch mode, in forward, in backward (autograd runs it in
the calling thread on the CPU), inside custom autograd functions, in optimizers and in collectives.
A storage counts from the operation that returns it until the last tensor on it is gone, once
however many views it has. Not seen: what one operation allocates and frees inside (a GPU's
allocator sees that), and storages resized or made without an operation (``UntypedStorage.resize_``,
``torch.from_numpy``).
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """``with LiveTensors(already) as live: ...``, then ``live.peak_bytes``.

    Holds weak references alone, so nothing lives longer for being counted. Storages that were there
    before count if a tensor of ``already`` is on them; others are told apart by their first
    appearance as an argument, and only ``unknown_bytes`` has them.
    """

    def __init__(self, already: Iterable[Tensor] = ()) -> None:
        """``already``: tensors there before, such as parameters and gradient buffers; views of one
        storage count once."""
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        """Of all counted storages now, and the most there were since the start or
        ``reset_peak``."""
        self.unknown_bytes = 0
        """Of live storages that were not told of and that no operation made."""
        self._counted: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}
        self._unknown: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}
        for tensor in already:
            self._count(tensor)

    def reset_peak(self) -> None:
        """Let the peak start again from what is live now."""
        self.peak_bytes = self.now_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        new = (
            func is torch.ops.aten.lift_fresh.default
        )  # what torch.tensor hands over: made just before, without an operation
        for tensor in () if new else tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._counted:
                self._note_unknown(tensor.untyped_storage())
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        """A storage's object stays the same one as long as the storage lives, so its id names it
        until its reference dies."""
        storage = tensor.untyped_storage()
        key = id(storage)
        num_bytes = storage.nbytes()
        if key in self._unknown or storage.device.type == "meta":
            return
        reference, counted = self._counted.get(key) or (
            weakref.ref(storage, lambda _: self._gone(key)),
            0,
        )
        self._counted[key] = (reference, num_bytes)
        self.now_bytes += num_bytes - counted  # resize_ and out= may have changed it
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _gone(self, key: int) -> None:
        self.now_bytes -= self._counted.pop(key)[1]

    def _note_unknown(self, storage: UntypedStorage) -> None:
        key = id(storage)
        if key not in self._unknown and storage.device.type != "meta":
            self._unknown[key] = (
                weakref.ref(storage, lambda _: self._forget(key)),
                storage.nbytes(),
            )
            self.unknown_bytes += storage.nbytes()

    def _forget(self, key: int) -> None:
        self.unknown_bytes -= self._unknown.pop(key)[1]
