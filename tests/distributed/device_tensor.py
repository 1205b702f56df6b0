"""A stand-in for a tensor on a GPU, on machines without one: gloo cannot reach its values."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class DeviceTensor(Tensor):
    """A tensor whose values gloo cannot see: as with a GPU's, only copies to and from the host
    work."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        settings = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
        }
        # "meta" has no memory: whatever reads this tensor directly fails instead of reading zeros.
        made = Tensor._make_wrapper_subclass(cls, held.shape, device="meta", **settings)  # pyright: ignore
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.detach.default:
            return cls(args[0].held)
        # Device to host, as ``tensor.cpu()`` does it.
        if func is aten._to_copy.default:
            assert kwargs["device"].type == "cpu"
            return args[0].held.clone(memory_format=kwargs["memory_format"])
        # Host to device: what a collective has delivered.
        if func is aten.copy_.default:
            args[0].held.copy_(args[1])
            return args[0]
        # Arithmetic and views would be work on the GPU's stream, which staging leaves alone.
        raise AssertionError(f"{func} on a tensor of the device")


def on_device(held: Tensor) -> Tensor:
    return DeviceTensor(held)


def on_devices(held: Iterable[Tensor]) -> list[Tensor]:
    return [on_device(tensor) for tensor in held]


def on_host(held: Tensor) -> Tensor:
    return held
