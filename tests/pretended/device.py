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
import inspect
import sys
from collections.abc import Callable, Iterator
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

from tests.pretended.recorder import KERNELS_OF_TORCH, NAME, Recorder, on_gpu, place

aten = torch.ops.aten
# The host needs the size to allocate the result, and only the device knows it.
SIZE_DEPENDS_ON_VALUES = {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
}
"""Operations whose result has a size that depends on values, with their names in the record."""


def _device(value: Any) -> Any:
    """Read a CUDA device, or a device's number, as the pretended one."""
    if value is None:
        return None
    # torch takes a bare number, as in ``device=torch.cuda.current_device()``, for a CUDA device.
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
        self.kept: list[torch.Tensor] = []
        # torch's own tolist asks for item after item, which would count as so many waits.
        FakeTensor.tolist = lambda t: self.values(t).tolist()  # pyright: ignore
        # A fake tensor has no address. Launchers ask whether one is a multiple of 16, and the fused
        # base weights whether two are the same: the storage's identity and the offset answer both.
        FakeTensor.data_ptr = lambda t: (
            t.untyped_storage()._cdata + t.storage_offset() * t.element_size()
        )  # pyright: ignore
        self.special: dict[Any, Callable[..., Any]] = {
            torch.tensor: self.tensor,
            torch.as_tensor: self.tensor,
            torch.from_numpy: self.from_numpy,
            torch.Tensor.cuda: lambda t, *args, **kwargs: t.to("cuda", **kwargs),
            torch.Tensor.numpy: lambda t, **kwargs: self.values(t),
            # Megatron's optimizer finds parameters in half precision by "torch.cuda.HalfTensor".
            torch.Tensor.type: self.type_name,
            torch.Tensor.pin_memory: self.pin_memory,
            torch.Tensor.is_pinned: lambda t, *args: t.untyped_storage()._cdata in recorder.pinned,
            # The allocator of a real GPU is told who still reads a tensor; here nothing is freed.
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
            args = self.with_device(args)
        # ``pin_memory=True`` of torch.empty and the like asks the real CUDA driver for pages.
        if kwargs.pop("pin_memory", False):
            return self.pin_memory(func(*args, **kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def with_device(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of ``Tensor.to``, which takes a device at any place, a dtype or a tensor."""
        found = []
        for value in args:
            is_device = isinstance(value, str | torch.device)
            found.append(_device(value) if is_device else value)
        return tuple(found)

    def tensor(self, data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """A tensor from numbers is made on the host and copied."""
        made = data
        if not isinstance(data, torch.Tensor):
            made = torch.tensor(_numbers(data), *args, **kwargs)
        return made if device is None else made.to(_device(device))

    def from_numpy(self, array: np.ndarray) -> torch.Tensor:
        # No element is needed to ask which dtype of torch numpy's corresponds to.
        return torch.empty(array.shape, dtype=torch.from_numpy(array[:0]).dtype)

    def values(self, t: torch.Tensor) -> np.ndarray:
        """Ones of the tensor's shape; a wait where it is on the device."""
        if on_gpu(t):
            self.recorder.wait("values to the host")
        # "megalora/lora/coverage.py:check_coverage", or "...:Class.method": the bare name.
        where = place().rpartition(".")[2].rpartition(":")[2]
        if where in self.recorder.answers:
            return self.recorder.answers[where](tuple(t.shape))
        kind = "i8"
        if t.dtype.is_floating_point:
            kind = "f8"
        elif t.dtype == torch.bool:
            kind = "?"
        return np.ones(tuple(t.shape), dtype=kind)

    def type_name(self, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return t.to(*args, **kwargs)
        return torch.Tensor.type(t).replace(f"torch.{NAME}.", "torch.cuda.")

    def pin_memory(self, t: torch.Tensor, *args: Any) -> torch.Tensor:
        pinned = t.clone()
        self.recorder.pinned.add(pinned.untyped_storage()._cdata)
        # Kept alive, so that no later storage in pageable memory gets its address.
        self.kept.append(pinned)
        return pinned


class Watch(TorchDispatchMode):
    """Note every operation that stops the host until the device has got there."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What item(), float(), int() and bool() of a tensor all come to.
        if func is aten._local_scalar_dense.default:
            return self.scalar(args[0])
        if func in KERNELS_OF_TORCH:
            self.recorder.kernel(KERNELS_OF_TORCH[func])
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
            # copy_(self, source, non_blocking=False): positional where C++ calls it.
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self.move(args[1], args[0].device, non_blocking)
        return func(*args, **kwargs)

    def scalar(self, t: torch.Tensor) -> Any:
        if on_gpu(t):
            self.recorder.wait("item")
            # Flags that the host reads from the device report trouble; here there is none.
            if t.dtype == torch.bool:
                return False
        elif (constant := getattr(t, "constant", None)) is not None:
            # A fake tensor on the host that was made from a number still knows it.
            return constant.item()
        if t.dtype.is_floating_point:
            return 1.0
        return True if t.dtype == torch.bool else 1

    def nothing(self, func: Any, t: torch.Tensor) -> Any:
        if func is aten.nonzero.default:
            return torch.empty(0, t.dim(), dtype=torch.int64, device=t.device)
        return t.new_empty(0)

    def index(self, func: Any, args: Any) -> Any:
        """An index by a mask asks for the mask's places first; answered as if none were set."""
        # x[mask] = number becomes masked_fill, which needs no places.
        filled = func is not aten.index.Tensor and args[2].numel() == 1
        if filled or not on_gpu(args[0]):
            return args
        indices: list[Any] = []
        has_mask = False
        for i in args[1]:
            if i is not None and i.dtype in (torch.bool, torch.uint8):
                has_mask = True
                # A mask over n dimensions stands for n lists of places.
                indices += [i.new_empty(0, dtype=torch.int64)] * i.dim()
            else:
                indices.append(i)
        if not has_mask:
            return args
        self.recorder.wait("index by a mask")
        return (args[0], indices, *args[2:])

    def move(self, source: torch.Tensor, to: Any, non_blocking: bool) -> None:
        to = source.device if to is None else torch.device(to)
        if source.device.type == "cpu" and to.type == NAME:
            # FakeTensorMode would copy a known number in earnest, to a device that is not there.
            source.constant = None  # pyright: ignore
            self.recorder.copy_to_device(source, non_blocking)
        elif source.device.type == NAME and to.type == "cpu" and not non_blocking:
            self.recorder.wait("copy to the host")


class Stream:
    """A stream or event: accepts every call; to synchronise with it is a wait."""

    recorder: Recorder

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None:
        self.recorder.wait("synchronize")

    # wait_stream, record, query and the rest order work on the device and do not stop the host.
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
    # torch.cuda re-exports these from its submodule, and callers use either name.
    torch.cuda.random.get_rng_state = answers["get_rng_state"]
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda *args, **kwargs: None  # pyright: ignore


def _launch_nothing(recorder: Recorder) -> None:
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            for value in (*args, *kwargs.values()):
                # Triton's own launcher refuses a tensor in host memory, too.
                assert not isinstance(value, torch.Tensor) or on_gpu(value), (
                    f"{kernel.fn.__name__} was given a tensor on {value.device}"
                )
            recorder.kernel(kernel.fn.__name__)
            if recorder.on_launch is not None:
                recorder.on_launch(kernel, args, kwargs)

        return launch

    # ``kernel[grid](...)``; kernels are of the second class where TRITON_INTERPRET=1.
    JITFunction.__getitem__ = launcher  # pyright: ignore
    InterpretedFunction.__getitem__ = launcher  # pyright: ignore


def note_compiled(recorder: Recorder) -> None:
    """Count calls of what Megatron compiles at run time: the compiler costs every rank seconds at
    the first of them."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("megatron.core"):
            continue
        # Functions of the module and methods of its classes; imported classes come in their own.
        owners: list[Any] = [module]
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == name:
                owners.append(value)
        for owner in owners:
            for attribute, value in list(vars(owner).items()):
                # torch.compile leaves the function that it was given under this name.
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
