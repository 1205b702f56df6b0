"""Read every request for a CUDA device as one for the CPU, for code that asks without looking;
``host.install`` uses it."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _to_host(device: Any) -> Any:
    if device is None or isinstance(device, int):
        return torch.device("cpu") if device is not None else None
    return torch.device("cpu") if torch.device(device).type == "cuda" else device


class CudaMeansCpu(TorchFunctionMode):
    """Sends tensors that someone wants on a CUDA device to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and func not in _MAY_NAME_A_DEVICE:  # nearly every call, attributes' included
            return func(*args)
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers compare type names with "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_host(kwargs["device"])
        if func is torch.Tensor.to:
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
