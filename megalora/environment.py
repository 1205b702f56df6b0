"""Set environment variables of torch that need other defaults here, and read
``MEGALORA_SHARE_GPU``.

Needs no torch: some versions of torch read the allocator's variable as their CUDA library is
loaded, so a rank calls ``set_defaults`` before it imports torch. A variable that the user has set,
under any of its names, stays as it is.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names that torch 2.11 to 2.13 read; the first is today's, and torch warns of the second."""
SHARE_GPU = "MEGALORA_SHARE_GPU"
ERROR_HANDLING = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")
DUMP_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def set_defaults(
    run: Path | None = None, environment: MutableMapping[str, str] | None = None
) -> None:  # fmt: skip
    """Set the variables that the user has not set.

    Expandable segments: batches differ in length from step to step, and memory cut into blocks of
    fixed sizes would fragment.

    NCCL: on an error its watchdog aborts the communicators but not the process (2, CleanUpOnly;
    torch's default 3 kills the process from another thread), so that the next collective raises and
    the rank can say what happened. Every rank writes its last collectives to ``nccl_rank_N`` in the
    run's folder; torch keeps the last 2,000 of them without being asked.

    Args:
        run: the run's folder, for dumps; None leaves the place to torch.
        environment: variables to change; the process's own by default.
    """
    # Not ``environment or os.environ``: an empty one is meant, too.
    variables = os.environ if environment is None else environment
    _set(variables, ALLOCATOR, "expandable_segments:True")
    _set(variables, ERROR_HANDLING, "2")
    _set(variables, ("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1")
    if run is not None:
        _set(variables, DUMP_FILE, str(run.absolute() / "nccl_rank_"))


def _set(variables: MutableMapping[str, str], names: tuple[str, ...], value: str) -> None:
    """Set the first of several names of one variable unless one of them is set."""
    if not any(name in variables for name in names):
        variables[names[0]] = value


def shares_gpu() -> bool:
    """Whether all ranks compute on one GPU (``MEGALORA_SHARE_GPU=1``): to try a layout, not for
    speed.

    Raises ``ValueError`` for another value than 0 or 1, and where more than one node takes part.
    """
    # An empty variable counts as one that is not set.
    value = os.environ.get(SHARE_GPU) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{SHARE_GPU}={value}: set it to 1 to run all ranks on one GPU, or to 0")
    # torchrun sets both.
    world = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if value == "1" and here != world:
        raise ValueError(
            f"{SHARE_GPU}=1 is for one machine, but {here} of {world} ranks run here. "
            "Unset it to use the GPUs of every node."
        )
    return value == "1"


def refuse_shared_gpu() -> None:
    """Raise ``ValueError`` where ranks share a GPU: no speed can be measured there."""
    if shares_gpu():
        raise ValueError(
            f"{SHARE_GPU}=1: ranks that share a GPU have no speed to measure. Unset it and start"
            " one rank for each GPU."
        )
