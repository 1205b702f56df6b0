"""Find where the threads of a rank are, as far as Python and NCCL know."""

import faulthandler
import sys
import sysconfig
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

OURS = str(Path(__file__).parents[2])
LIBRARIES = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
BETWEEN = ("cpu_device.py", "staged.py")
"""Files of ours that stand between who calls torch and torch."""
WAITING = "torch/distributed/"
"""Part of the paths of files whose functions wait for other ranks."""
STACK = "stuck_rank_{rank}.txt"
"""File in the run's folder with the stacks of a rank of a run that hung."""
TRACE = "nccl_rank_{rank}"
"""File in the run's folder with NCCL's last collectives; torch's own dumps have this name, too."""


def place_of(thread: int) -> tuple[str, bool]:
    """(file:line function, whether it waits for other ranks) of a thread; ("", False) if it has
    ended.

    A call of a library is named by who made it: all waits end in the same few functions of torch.
    """
    innermost = sys._current_frames().get(thread)
    if innermost is None:
        return "", False
    waits = False
    frame: FrameType | None = innermost
    while frame is not None and _is_library(frame.f_code.co_filename):
        waits |= WAITING in frame.f_code.co_filename
        frame = frame.f_back
    shown = frame or innermost
    name = Path(shown.f_code.co_filename).name
    return f"{name}:{shown.f_lineno} {shown.f_code.co_name}", waits


def _is_library(file: str) -> bool:
    # An installed megalora lies among the libraries.
    if file.startswith(OURS):
        return file.endswith(BETWEEN)
    return file.startswith(LIBRARIES)


def write_stacks(run: Path, rank: int) -> None:
    """Write the stacks of all threads, and under NCCL the last collectives, into the run's folder.

    Raises ``OSError`` where they cannot be written.
    """
    with (run / STACK.format(rank=rank)).open("w") as file:
        faulthandler.dump_traceback(file)
    if dist.get_backend() == "nccl":
        # torch's own dump comes at the collective's timeout, which is minutes away.
        recorder = torch._C._distributed_c10d._dump_nccl_trace  # pyright: ignore
        (run / TRACE.format(rank=rank)).write_bytes(recorder())
