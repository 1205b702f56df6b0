"""Runs Megatron-Core with or without a GPU. The only file that touches ``torch.cuda``.

With a GPU: nccl, CUDA, nothing is changed. Without one: gloo, and Megatron's unconditional
``torch.cuda`` calls are answered by the CPU. ``install()`` must run before anything from
``megatron`` is imported; ``import megalora.host`` does nothing by itself.
"""

import contextlib
import contextvars
import functools
import gc
import inspect
import logging
import os
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megalora import staged
from megalora.cpu_device import CudaMeansCpu, NoStream
from megalora.environment import SHARE_GPU, set_defaults, shares_gpu
from megalora.rendezvous import meeting_place

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
        with contextlib.nullcontext() if not torch.cuda.is_available() else CudaMeansCpu():
            yield
    finally:
        _ON_HOST.reset(token)


def device() -> torch.device:
    """Where this rank computes."""
    if _ON_HOST.get():
        return torch.device("cpu")
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def world_size() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def peak_memory_bytes() -> int:
    """Largest amount of device memory allocated so far; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def reset_peak_memory() -> None:
    """Let ``peak_memory_bytes`` start again from what is allocated now; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def release_memory() -> None:
    """Give memory of what is no longer used back to the device, for another process to take."""
    gc.collect()  # modules and their hooks refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_bytes() -> int:
    """Memory of this rank's GPU, or its share of it; without one, of this machine."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(device()).total_memory
        return total // world_size() if shares_gpu() else total
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes() -> int:
    """What nobody has taken of the GPU's memory; without one, ``memory_bytes``: the system gives
    back its caches."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else memory_bytes()


class Stopwatch:
    """Takes moments: when the device gets to where the current stream stands now; without a GPU,
    what the clock says."""

    @staticmethod
    def mark() -> Any:
        """A moment, for ``seconds_between`` alone."""
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_between(a: Any, b: Any) -> float:
    """From one moment of a ``Stopwatch`` to a later one; on a GPU waits until the device has got to
    ``b``."""
    if isinstance(b, float):
        return b - a
    b.synchronize()
    return a.elapsed_time(b) / 1e3


def synchronize() -> None:
    """Wait until the device has done all it was given; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a host tensor to this rank's device without waiting: through page-locked memory; itself
    without a GPU.

    torch keeps the page-locked copy until the device has read it.
    """
    return (
        tensor.pin_memory().to(device(), non_blocking=True) if torch.cuda.is_available() else tensor
    )


def keep_busy(cycles: int) -> None:
    """Have the current stream spin, so that the host gets ahead of the device; nothing without a
    GPU."""
    spin = getattr(torch.cuda, "_sleep", None)  # private to torch
    if torch.cuda.is_available() and spin is not None:
        spin(cycles)


def seed_rng(seed: int, rank: int) -> None:
    """Seed every generator this rank's dropout can draw from, differently from every other rank's.

    Megatron runs the decoder on a generator of its own under sequence parallelism.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed + 104_729 * (rank + 1))
    model_parallel_cuda_manual_seed(seed + 104_729 * (rank + 1), force_reset_rng=True)


def rng_state() -> dict[str, torch.Tensor]:
    """The state of all of these generators."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state | {f"tracker.{name}": t for name, t in tracker.get_states().items()}


def set_rng_state(state: dict[str, torch.Tensor]) -> bool:
    """Restore what ``rng_state`` returned; False where another kind of device made it.

    The states of the other kind's generators do not fit here: the host's alone is restored then.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() != ("cuda" in state):
        return False
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states(
        {k.removeprefix("tracker."): t for k, t in state.items() if k.startswith("tracker.")}
    )
    return True


@contextlib.contextmanager
def process_group(timeout_minutes: float = 30) -> Iterator[str | None]:
    """Join the world that torchrun describes in the environment (a world of one without it), and
    leave it at the end.

    Yields the name of torchrun's job, the same whenever it starts the ranks again; None without
    torchrun.
    """
    set_defaults()
    install()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    rank = int(os.environ.get("RANK", 0))
    size = world_size()
    backend = _choose_device()
    store, job = meeting_place(rank, size, timeout_minutes)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device() if backend == "nccl" else None,
    )  # fmt: skip
    try:
        yield job
    except BaseException:
        # nccl waits for every rank when it shuts down, and the others may be waiting for this one.
        if backend != "nccl":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _choose_device() -> str:
    """Have this rank compute on its GPU, if there is one; return the back end of its groups."""
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
    """Take this rank's part of the first GPU: as much as every other rank, context included."""
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
    torch.cuda.set_per_process_memory_fraction(share / total, 0)
    staged.register()
    return staged.BACKEND


@contextlib.contextmanager
def fake_world(rank: int, num_ranks: int) -> Iterator[None]:
    """This process as rank ``rank`` of ``num_ranks``, over torch's fake process group: collectives
    return at once and move nothing.

    For building a rank of any world without the others.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def timeout_minutes() -> float:
    """How long ranks of the world wait for each other; groups made later ask, or torch gives them
    30 minutes."""
    world: Any = dist.group.WORLD
    staging = isinstance(world, staged.StagedGroup)
    backend: Any = world._get_backend(torch.device("cpu") if staging else device())
    options = getattr(backend, "options", None)  # a fake back end, which waits for nobody, has none
    return 30 if options is None else options._timeout.total_seconds() / 60


@functools.cache
def install() -> None:
    """Make Megatron-Core run on this machine, and without its compiler. Idempotent."""
    _hush()
    _leave_router_uncompiled()
    if torch.cuda.is_available():
        return
    CudaMeansCpu().__enter__()
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.manual_seed = torch.manual_seed  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: (
        torch.get_rng_state()
    )  # type: ignore
    torch.cuda.Stream = NoStream  # type: ignore
    torch.cuda.current_stream = lambda *args: NoStream()  # type: ignore
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore
    torch.cuda.synchronize = lambda *args: None
    _install_in_megatron()


def _hush() -> None:
    """Keep off the user's screen what Megatron, Bridge and torch say about parts that are not used
    or work as meant."""
    for name in ("megatron", "torch.utils.cpp_extension", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # invalid escapes in Megatron's docstrings
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    told = "Apex|[Tt]ransformer.[Ee]ngine|is deprecated. Please use|not a leaf Tensor|experimental"
    warnings.filterwarnings("ignore", message=f".*({told}).*")


def _leave_router_uncompiled() -> None:
    """Megatron compiles the update of a bias that is not in use here; starting the compiler costs
    every rank seconds."""
    import megatron.core.transformer.moe.router as router

    router.TopKRouter._apply_expert_bias = inspect.unwrap(router.TopKRouter._apply_expert_bias)


def _install_in_megatron() -> None:
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    # On a GPU this copies to the host; here the tensors are there already, but the splits must
    # still become numpy.
    dispatcher.maybe_move_tensor_to_cpu = lambda t, as_numpy=False, record_stream=False: (
        t.numpy() if torch.is_tensor(t) and as_numpy else t
    )
    # The dispatcher gathers a different number of tokens from each expert-tensor-parallel rank,
    # which gloo refuses.
    even_gather = mappings._gather_along_first_dim
    even_scatter = mappings._reduce_scatter_along_first_dim

    def gather(
        input_: Any,
        group: Any,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ):
        if group.size() == 1 or output_split_sizes is None:
            return even_gather(input_, group, None, use_global_buffer)
        return staged.uneven_all_gather(input_, group, output_split_sizes)

    def scatter(
        input_: Any,
        group: Any,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ):
        if group.size() == 1 or input_split_sizes is None:
            return even_scatter(input_, group, None, use_global_buffer)
        return staged.uneven_reduce_scatter(input_, group, input_split_sizes)

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter
