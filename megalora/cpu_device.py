"""Send requests for a CUDA device to the CPU, for code that asks for one without looking.

``host.install`` uses it where there is no GPU.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _to_host(device: Any) -> Any:
    """The CPU in place of a CUDA device, named in any way that torch allows."""
    if device is None:
        return None
    # A number alone is that of a CUDA device.
    if isinstance(device, int) or torch.device(device).type == "cuda":
        return torch.device("cpu")
    return device


class CudaMeansCpu(TorchFunctionMode):
    """Sends tensors that someone wants on a CUDA device to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Nearly every call, reading an attribute included, must cost as little as possible.
        if not kwargs and func not in _MAY_NAME_A_DEVICE:
            return func(*args)
        kwargs = dict(kwargs or {})
        # tensor.cuda(): the tensor is where it should be.
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers compare type names with "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_host(kwargs["device"])
        if func is torch.Tensor.to:
            # tensor.to(device), tensor.to(dtype), tensor.to(other), tensor.to(device, dtype) ...
            args = tuple(_to_host(a) if isinstance(a, str | torch.device) else a for a in args)
        return func(*args, **kwargs)


_MAY_NAME_A_DEVICE = frozenset({torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to})


class NoStream:
    """A CUDA stream where there is none: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> "NoStream":
        return self
