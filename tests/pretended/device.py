"""A GPU that is not there: shapes, dtypes, devices and autograd as on an H100, no data, and a
record of every wait.

torch's FakeTensorMode runs on a device made from Python alone (PrivateUse1). An operation on
tensors of two devices raises an error. Where the host would wait for a real GPU, ``Recorder`` notes
who asked and answers something of the right shape, so that the step goes on. Triton kernels are not
launched; their outputs stay as allocated.

Nothing here can be taken back, and autograd must meet the device before its first pass: use a
process of its own.
"""

import contextlib
import functools
import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "gpu"


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

aten = torch.ops.aten
SIZE_DEPENDS_ON_VALUES = {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
}


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
        """Count what happens inside under ``name``; what happens outside of any phase is not
        counted."""
        for counters in (self.waits, self.copies, self.kernels):
            counters.setdefault(name, Counter())
        self.now = name
        yield
        self.now = None

    def wait(self, kind: str) -> None:
        """The host waits for the device here."""
        if self.now is not None:
            self.waits[self.now][f"{kind}: {place()}"] += 1

    def copy_to_device(self, source: torch.Tensor, non_blocking: bool) -> None:
        """A copy from page-locked memory that nobody waits for is free; any other stops the
        host."""
        if self.now is not None:
            self.copies[self.now][place()] += 1
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
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for folder, owner in OWNERS.items():
            if path.startswith(folder):
                return f"{owner}/{path.removeprefix(folder)}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "torch"


def _device(value: Any) -> Any:
    """Read a CUDA device, or a device's number, as the pretended one."""
    if value is None:
        return None
    if isinstance(value, int) or torch.device(value).type == "cuda":
        return torch.device(NAME, 0)
    return torch.device(value)


def _numbers(data: Any) -> Any:
    """Lists of numbers, as ``torch.tensor`` reads them: one tensor after the other."""
    if isinstance(data, list | tuple):
        return [_numbers(value) for value in data]
    return data.item() if isinstance(data, torch.Tensor) else data


class CudaMeansGpu(TorchFunctionMode):
    """Send every request for a CUDA device to the pretended one, and answer what needs values."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        FakeTensor.tolist = lambda t: self.values(t).tolist()  # pyright: ignore  torch's own asks for item after item
        FakeTensor.data_ptr = lambda t: (
            t.untyped_storage()._cdata + t.storage_offset() * t.element_size()
        )  # pyright: ignore
        self.special: dict[Any, Callable[..., Any]] = {
            torch.tensor: self.tensor,
            torch.as_tensor: self.tensor,
            torch.from_numpy: self.from_numpy,
            torch.Tensor.cuda: lambda t, *args, **kwargs: t.to("cuda", **kwargs),
            torch.Tensor.numpy: lambda t, **kwargs: self.values(t),
            torch.Tensor.type: self.type_name,
            torch.Tensor.pin_memory: self.pin_memory,
            torch.Tensor.is_pinned: lambda t, *args: t.untyped_storage()._cdata in recorder.pinned,
            torch.Tensor.record_stream: lambda t, stream: None,
            torch.Tensor.is_cuda.__get__: lambda t: t.device.type == NAME,  # pyright: ignore
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.special:
            return self.special[func](*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = _device(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_device(a) if isinstance(a, str | torch.device) else a for a in args)
        if kwargs.pop("pin_memory", False):
            return self.pin_memory(func(*args, **kwargs))
        return func(*args, **kwargs)

    def tensor(self, data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """A tensor from numbers is made on the host and copied."""
        made = (
            data
            if isinstance(data, torch.Tensor)
            else torch.tensor(_numbers(data), *args, **kwargs)
        )
        return made if device is None else made.to(_device(device))

    def from_numpy(self, array: np.ndarray) -> torch.Tensor:
        return torch.empty(array.shape, dtype=torch.from_numpy(array[:0]).dtype)

    def values(self, t: torch.Tensor) -> np.ndarray:
        """Ones of the tensor's shape; a wait where it is on the device."""
        if on_gpu(t):
            self.recorder.wait("values to the host")
        where = place().rpartition(".")[2].rpartition(":")[2]
        if where in self.recorder.answers:
            return self.recorder.answers[where](tuple(t.shape))
        kind = "f8" if t.dtype.is_floating_point else "?" if t.dtype == torch.bool else "i8"
        return np.ones(tuple(t.shape), dtype=kind)

    def type_name(self, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return t.to(*args, **kwargs)
        return torch.Tensor.type(t).replace(f"torch.{NAME}.", "torch.cuda.")

    def pin_memory(self, t: torch.Tensor, *args: Any) -> torch.Tensor:
        pinned = t.clone()
        self.recorder.pinned.add(pinned.untyped_storage()._cdata)
        # so that no other storage gets its address
        self.kept = [*getattr(self, "kept", []), pinned]
        return pinned


class Watch(TorchDispatchMode):
    """Note every operation that stops the host until the device has got there."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self.scalar(args[0])
        if func in SIZE_DEPENDS_ON_VALUES and on_gpu(args[0]):
            self.recorder.wait(SIZE_DEPENDS_ON_VALUES[func])
            return self.nothing(func, args[0])
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = self.index(func, args)
        elif (
            func is aten.repeat_interleave.Tensor
            and on_gpu(args[0])
            and kwargs.get("output_size") is None
        ):
            self.recorder.wait("repeat_interleave without its size")
            return args[0].new_empty(0)
        elif func is aten.equal.default and on_gpu(args[0]):
            self.recorder.wait("equal")
            return True
        elif func is aten._to_copy.default:
            self.move(args[0], kwargs.get("device"), kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            self.move(args[1], args[0].device, not blocking)
        elif func is aten._grouped_mm.default:
            self.recorder.kernel("grouped_mm")
        return func(*args, **kwargs)

    def scalar(self, t: torch.Tensor) -> Any:
        if on_gpu(t):
            self.recorder.wait("item")
            if t.dtype == torch.bool:
                return False
        elif (constant := getattr(t, "constant", None)) is not None:
            return constant.item()
        return 1.0 if t.dtype.is_floating_point else t.dtype == torch.bool or 1

    def nothing(self, func: Any, t: torch.Tensor) -> Any:
        if func is aten.nonzero.default:
            return torch.empty(0, t.dim(), dtype=torch.int64, device=t.device)
        return t.new_empty(0)

    def index(self, func: Any, args: Any) -> Any:
        """An index by a mask asks for the mask's places first; answered as if none were set."""
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        filled = func is not aten.index.Tensor and args[2].numel() == 1  # becomes masked_fill
        if not masks or not on_gpu(args[0]) or filled:
            return args
        self.recorder.wait("index by a mask")
        indices: list[Any] = []
        for i in args[1]:
            is_mask = any(i is mask for mask in masks)
            indices += [i.new_empty(0, dtype=torch.int64)] * i.dim() if is_mask else [i]
        return (args[0], indices, *args[2:])

    def move(self, source: torch.Tensor, to: Any, non_blocking: bool) -> None:
        to = source.device if to is None else torch.device(to)
        if source.device.type == "cpu" and to.type == NAME:
            source.constant = None  # else torch would make the copy in earnest  # pyright: ignore
            self.recorder.copy_to_device(source, non_blocking)
        elif source.device.type == NAME and to.type == "cpu" and not non_blocking:
            self.recorder.wait("copy to the host")


class Stream:
    """A stream or event: accepts every call; to synchronise with it is a wait."""

    recorder: Recorder

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None:
        self.recorder.wait("synchronize")

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


class Module(_DummyBackendModule):
    """What torch asks ``torch.gpu`` for: random states, which this device has none of."""

    def get_rng_state(self, *args: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *args: Any) -> None: ...
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def device(self, *args: Any) -> Any:
        return contextlib.nullcontext()


def _answer_for_cuda(recorder: Recorder) -> None:
    Stream.recorder = recorder

    def synchronize(*args: Any) -> None:
        recorder.wait("synchronize")

    answers: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 8, "current_device": lambda: 0,
        "synchronize": synchronize,
        "get_device_capability": lambda *a: (9, 0), "get_device_name": lambda *a: "pretended H100",
        "Stream": Stream, "Event": Stream, "current_stream": lambda *a: Stream(),
        "default_stream": lambda *a: Stream(),
        "stream": lambda stream: contextlib.nullcontext(), "set_device": lambda *a: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "max_memory_allocated": lambda *a: 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = answers["get_rng_state"]
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda *args, **kwargs: None  # pyright: ignore


def _launch_nothing(recorder: Recorder) -> None:
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            away = [t.device for t in tensors if not on_gpu(t)]
            assert not away, f"{kernel.fn.__name__} was given a tensor on {away[0]}"
            recorder.kernel(kernel.fn.__name__)
            if recorder.on_launch is not None:
                recorder.on_launch(kernel, args, kwargs)

        return launch

    JITFunction.__getitem__ = launcher  # pyright: ignore
    InterpretedFunction.__getitem__ = launcher  # pyright: ignore


def note_compiled(recorder: Recorder) -> None:
    """Count calls of what Megatron compiles at run time: the compiler costs every rank seconds at
    the first of them."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("megatron.core"):
            continue
        owners = [
            module,
            *(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == name),
        ]
        for owner in owners:
            for attribute, value in list(vars(owner).items()):
                if inspect.isfunction(value) and hasattr(value, "_torchdynamo_orig_callable"):
                    setattr(owner, attribute, _counted(recorder, value._torchdynamo_orig_callable))


def _counted(recorder: Recorder, function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder.wait(f"compiled {function.__name__}")
        return function(*args, **kwargs)

    return call


def install(recorder: Recorder) -> None:
    """Make this process believe in an H100 (compute capability 9.0); before anything of Megatron is
    imported."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    _answer_for_cuda(recorder)
    _launch_nothing(recorder)


@contextlib.contextmanager
def pretended_gpu(recorder: Recorder) -> Iterator[None]:
    """Tensors made inside have shapes and devices and no data."""
    with FakeTensorMode(allow_non_fake_inputs=True), Watch(recorder), CudaMeansGpu(recorder):
        yield
