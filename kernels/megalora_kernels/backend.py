"""Which back end computes: the rule, and the override.

Named by an argument, or by the environment variable MEGALORA_BACKEND, or chosen by this rule:

    CPU; float64                                                         loop
    stacked rank > 256; GPUs before compute capability 8.0               loop
    stacked rank > 128 (a tile of all rank columns lives in registers)   grouped_mm
    not bfloat16, or neither Hopper nor datacentre Blackwell,            triton
        where torch's grouped GEMM is a loop on the host
    fewer rows per expert than ``tuned.vendor_from``, or no room         triton
    else                                                                 grouped_mm

``tuned.vendor_from`` has the number of rows for the layer from the table measured on this GPU, else
1,024. Room in the weights is made by the same rule (``prefers_grouped_mm``), for the rows that are
expected.

``triton``, and ``grouped_mm`` where the fourth line does not apply, leave the offsets on the
device; ``loop`` and ``reference`` read them on the host.
"""

import os
from collections.abc import Sequence

import torch
from triton import knobs

from .grouped_gemm import why_not_grouped_mm
from .tuned import RULE_VENDOR_FROM, vendor_from

BACKENDS = ("reference", "loop", "grouped_mm", "triton")
ENV_BACKEND = "MEGALORA_BACKEND"
# of the GEMM's tiles, and of the passes that grouped_mm shares with it
MAX_TRITON_RANK = 128
MAX_PASS_RANK = 256
NEARLY = 0.99
"""Of the rows that the table says are enough: a sample of 4,096 tokens has 4,095 inputs, its last
token being only predicted. Room in the weights is decided by the former number."""
# read once: kernels are decorated when this package is imported
INTERPRETED: bool = knobs.runtime.interpret


def choose(
    backend: str | None, what: str, x: torch.Tensor, num_rows: int, rank: int,
    weights: Sequence[torch.Tensor],
    room: bool = False, layer: tuple[int, int] | None = None,
) -> str:  # fmt: skip
    """The back end to take, by the rule above or by name.

    Args:
        backend: a name, or None for the environment's or the rule's.
        what: who asks, for messages.
        x: an operand.
        num_rows: M.
        rank: the largest stacked rank; 0 without adapter.
        weights: the frozen weights ``[E, N, K]``.
        room: whether the weights have room for the adapter.
        layer: hidden and intermediate size, where the weights are those of a layer's experts.

    Raises:
        ValueError: no such back end, or one that cannot run here.
    """
    name = _by_name(backend, what)
    problems = {"triton": _why_not_triton(x, rank), "grouped_mm": _why_not_vendor(x, rank, weights)}
    if name is not None:
        if problems.get(name):
            raise ValueError(
                f"{what}: backend {name!r} cannot run: {problems[name]}; use 'loop' or 'reference'"
            )
        return name
    if not x.is_cuda:
        return "loop"
    has_room = rank == 0 or room
    rows_per_expert = num_rows / weights[0].shape[0]
    vendor_first = has_room and prefers_grouped_mm(x.dtype, x.device, rows_per_expert, rank, layer)
    order = ["grouped_mm", "triton"] if vendor_first else ["triton", "grouped_mm"]
    return next((name for name in order if problems[name] is None), "loop")


def prefers_grouped_mm(
    dtype: torch.dtype,
    device: torch.device,
    rows_per_expert: float,
    rank: int,
    layer: tuple[int, int] | None = None,
) -> bool:
    """Whether torch's grouped GEMM on joined operands is expected to be faster on this GPU than
    Triton.

    Args:
        rows_per_expert: M / E.
        rank: the larger of the stacked ranks of gate_up and down; 0 without adapter.
        layer: hidden and intermediate size on this rank; None where there is one linear alone.
    """
    if grouped_mm_syncs_host(dtype, device):
        return False
    least = RULE_VENDOR_FROM if layer is None else vendor_from(dtype, *layer, rank, device)
    return rows_per_expert >= NEARLY * least


def grouped_mm_syncs_host(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's grouped GEMM on this GPU is a loop that copies the offsets to the host: all
    but bfloat16 on Hopper and datacentre Blackwell (aten/src/ATen/native/cuda/GroupedBlas.cpp)."""
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] not in (9, 10)


def choose_pass(backend: str | None, what: str, x: torch.Tensor, rank: int) -> str:
    """``reference``, ``loop`` or ``triton`` for one step alone; ``grouped_mm`` has its steps from
    the other two."""
    name = _by_name(backend, what)
    problem = _why_not_triton(x, rank)
    if name == "triton" and problem:
        raise ValueError(
            f"{what}: backend 'triton' cannot run: {problem}; use 'loop' or 'reference'"
        )
    if name in ("reference", "loop", "triton"):
        return name
    return "triton" if x.is_cuda and problem is None else "loop"


def _by_name(backend: str | None, what: str) -> str | None:
    name = backend if backend is not None else os.environ.get(ENV_BACKEND) or None
    if name is not None and name not in BACKENDS:
        source = "backend" if backend is not None else f"the environment variable {ENV_BACKEND}"
        raise ValueError(f"{what}: {source} is {name!r}, want one of {', '.join(BACKENDS)}")
    return name


def _why_not_triton(x: torch.Tensor, rank: int) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{x.dtype} is not one of torch.bfloat16, torch.float16, torch.float32"
    if rank > MAX_TRITON_RANK:
        return f"the stacked rank {rank} exceeds {MAX_TRITON_RANK}"
    if not x.is_cuda and not (INTERPRETED and x.device.type == "cpu"):
        return (
            f"tensors are on {x.device}; Triton runs on GPUs, and on CPU only where"
            " TRITON_INTERPRET=1 from the start"
        )
    return _too_old(x)


def _too_old(x: torch.Tensor) -> str | None:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


def _why_not_vendor(x: torch.Tensor, rank: int, weights: Sequence[torch.Tensor]) -> str | None:
    if x.is_cuda and rank > MAX_PASS_RANK:
        return (
            f"the stacked rank {rank} exceeds {MAX_PASS_RANK}, more than the passes between GEMMs"
            " have shared memory for"
        )
    return next(filter(None, (_too_old(x), *(why_not_grouped_mm(x, w) for w in weights))), None)
