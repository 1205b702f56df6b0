"""Run Megatron-Core with or without a GPU. The only file that touches ``torch.cuda``.

With a GPU: nccl and CUDA, unchanged. Without one: gloo, and Megatron's unconditional ``torch.cuda``
calls are answered by the CPU. ``install()`` must run before anything from ``megatron`` is imported;
``import megalora.host`` does nothing by itself.
"""

import contextlib
import contextvars
import functools
import gc
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megalora import megatron_patches, staged
from megalora.cpu_device import CudaMeansCpu, NoStream
from megalora.environment import SHARE_GPU, set_defaults, shares_gpu
from megalora.rendezvous import Met, meeting_place

GIB = 1 << 30
CONTEXT_BYTES = GIB
"""GPU memory that a process takes beside tensors: CUDA's context, kernels, cuBLAS. Assumed."""

_ON_HOST = contextvars.ContextVar("on_host", default=False)


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Build and run modules on the CPU inside the block, also where there is a GPU; tensors stay
    where they are."""
    token = _ON_HOST.set(True)
    try:
        if torch.cuda.is_available():
            with CudaMeansCpu():
                yield
        else:
            # ``install`` has made CUDA mean the CPU in the whole process.
            yield
    finally:
        _ON_HOST.reset(token)


def device() -> torch.device:
    """The device that this rank computes on."""
    if _ON_HOST.get() or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def world_size() -> int:
    """Number of ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def uses_gpu() -> bool:
    """Whether this process has begun to use a GPU, so that it can no longer be forked."""
    return torch.cuda.is_initialized()


def device_name() -> str:
    """Name of the GPU's model; "CPU" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def peak_memory_bytes() -> int:
    """Largest amount of device memory allocated so far; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def reset_peak_memory() -> None:
    """Let ``peak_memory_bytes`` start again from what is allocated now; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def release_memory() -> None:
    """Return memory that is no longer used to the device, for another process to take."""
    # Modules and hooks refer to each other in circles, which only the collector frees.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_bytes() -> int:
    """Memory of this rank's GPU, or its share of it; without one, of this machine."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(device()).total_memory
        # Ranks that try a layout on one GPU have equal parts of it.
        return total // world_size() if shares_gpu() else total
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes() -> int:
    """GPU memory that no process has taken; without a GPU ``memory_bytes``, because the system
    gives back its caches."""
    if not torch.cuda.is_available():
        return memory_bytes()
    free, _ = torch.cuda.mem_get_info()
    return free


class Stopwatch:
    """Marks moments on the device: when it will have done what the current stream holds by now;
    without a GPU, the clock's time."""

    @staticmethod
    def mark() -> Any:
        """A moment; only ``seconds_between`` can read it."""
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_between(a: Any, b: Any) -> float:
    """Seconds from one moment of a ``Stopwatch`` to a later one; on a GPU waits until the device
    has reached ``b``."""
    if isinstance(b, float):
        return b - a
    b.synchronize()
    # Events count in milliseconds.
    return a.elapsed_time(b) / 1e3


def synchronize() -> None:
    """Wait until the device has done everything that was launched; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a host tensor to this rank's device through page-locked memory, without waiting; without
    a GPU, returns the tensor itself.

    torch keeps the page-locked copy until the device has read it.
    """
    if not torch.cuda.is_available():
        return tensor
    return tensor.pin_memory().to(device(), non_blocking=True)


class Arrival:
    """The moment when the device has done what the current stream holds by now; without a GPU it
    has come."""

    def __init__(self) -> None:
        self._event = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Return when the moment has come; from any thread."""
        if self._event is not None:
            self._event.synchronize()


class HostCopy:
    """A copy of a device tensor in host memory, begun when this is made: what is launched behind it
    does not delay it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Without a wait torch takes page-locked memory for the copy.
        self._copy = tensor.to("cpu", non_blocking=True)
        self._arrival = None
        if tensor.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def wait(self) -> torch.Tensor:
        """The copy, once the device has written it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copy


def kept_buffer(num_bytes: int) -> torch.Tensor:
    """Host memory to copy to without a wait: page-locked where there is a GPU. uint8
    ``[num_bytes]``."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def keep_busy(cycles: int) -> None:
    """Let the current stream spin, so that the host gets ahead of the device; nothing without a
    GPU."""
    # Private to torch: it may be gone in another version.
    spin = getattr(torch.cuda, "_sleep", None)
    if torch.cuda.is_available() and spin is not None:
        spin(cycles)


def seed_rng(seed: int, rank: int) -> None:
    """Seed every generator this rank's dropout can draw from, differently from every other rank's:
    Megatron's too, on which it runs the decoder under sequence parallelism."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # A prime far above any number of ranks: neighbouring seeds of two runs share no rank's masks.
    torch.manual_seed(seed + 104_729 * (rank + 1))
    model_parallel_cuda_manual_seed(seed + 104_729 * (rank + 1), force_reset_rng=True)


def rng_state() -> dict[str, torch.Tensor]:
    """The state of every generator that ``seed_rng`` seeds, by name."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, tracked in tracker.get_states().items():
        state[f"tracker.{name}"] = tracked
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> bool:
    """Restore what ``rng_state`` returned; False where it is from another kind of device, whose
    generators have states that do not fit here: then only the host's is restored."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() != ("cuda" in state):
        return False
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracked: dict[str, torch.Tensor] = {}
    for name, saved in state.items():
        if name.startswith("tracker."):
            tracked[name.removeprefix("tracker.")] = saved
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states(tracked)
    return True


@contextlib.contextmanager
def process_group(timeout_minutes: float = 30) -> Iterator[Met]:
    """Join the world that torchrun describes in the environment (a world of one without it), and
    leave it at the end.

    Yields the ranks' store and the name of torchrun's job.

    Args:
        timeout_minutes: how long a rank waits for the others in a collective.
    """
    set_defaults()
    install()
    # Without torchrun the one rank meets nobody, and still needs an address.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    rank = int(os.environ.get("RANK", 0))
    size = world_size()
    # The device comes first: nccl must know it when the group is made.
    backend = _choose_device()
    met = meeting_place(rank, size, timeout_minutes)
    dist.init_process_group(
        backend, store=met.store, rank=rank, world_size=size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device() if backend == "nccl" else None,
    )  # fmt: skip
    try:
        yield met
    except BaseException:
        # nccl waits for every rank when it shuts down, and the others may be waiting for this one.
        if backend != "nccl":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _choose_device() -> str:
    """Let this rank compute on its GPU, if there is one; returns the back end of its groups."""
    if shares_gpu():
        return _share_gpu()
    if not torch.cuda.is_available():
        return "gloo"
    local = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"local rank {local} has no GPU of its own: this machine shows {count}. Start at most "
            f"{count} ranks here, set {SHARE_GPU}=1 to try a layout on one GPU, or set "
            'CUDA_VISIBLE_DEVICES="" to run on the CPU.'
        )
    torch.cuda.set_device(local)
    return "nccl"


def _share_gpu() -> str:
    """Take this rank's part of the first GPU, an equal one with its context included; returns the
    back end of its groups."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"{SHARE_GPU}=1, but this machine shows no GPU to share. "
            "Unset it to run the ranks on the CPU."
        )  # fmt: skip
    torch.cuda.set_device(0)
    total = torch.cuda.get_device_properties(0).total_memory
    share = total // world_size() - CONTEXT_BYTES
    if share <= 0:
        raise ValueError(
            f"{SHARE_GPU}=1: {world_size()} ranks leave each less than the"
            f" {CONTEXT_BYTES / GIB:.0f} GiB that its process takes of a GPU of {total / GIB:.1f}"
            " GiB. Start fewer ranks."
        )
    # Held to its part, a rank runs out of memory as it would on a GPU of its own.
    torch.cuda.set_per_process_memory_fraction(share / total, 0)
    # nccl refuses two ranks on one GPU.
    staged.register()
    return staged.BACKEND


def timeout_minutes() -> float:
    """Minutes that ranks of the world wait for each other. Groups made later must be given it, or
    torch gives them 30 minutes."""
    world: Any = dist.group.WORLD
    staging = isinstance(world, staged.StagedGroup)
    backend: Any = world._get_backend(torch.device("cpu") if staging else device())
    # A fake back end waits for no rank and has no options.
    options = getattr(backend, "options", None)
    if options is None:
        return 30
    return options._timeout.total_seconds() / 60


@functools.cache
def install() -> None:
    """Make Megatron-Core run on this machine, and without its compiler. Idempotent."""
    megatron_patches.hush()
    megatron_patches.leave_router_uncompiled()
    if torch.cuda.is_available():
        return
    # Never left: from now on every request for a CUDA device is one for the CPU.
    CudaMeansCpu().__enter__()
    # What Megatron calls without looking whether there is a GPU.
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.manual_seed = torch.manual_seed  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: (
        torch.get_rng_state()
    )  # type: ignore
    torch.cuda.Stream = NoStream  # type: ignore
    torch.cuda.current_stream = lambda *args: NoStream()  # type: ignore
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore
    torch.cuda.synchronize = lambda *args: None
    megatron_patches.run_on_cpu()
