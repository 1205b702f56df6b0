"""Run a function on several gloo ranks of this machine. No GPU, no ports, nothing imported
twice."""

import gc
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo"
) -> list[Any]:
    """``fn(*args)`` on every rank; what each returned, by rank. A failure on any rank fails the
    test with its traceback."""
    # A gloo group that this process made and forgot must end here: its destructor joins threads,
    # which a forked rank lacks, and a rank whose garbage collection came upon it would wait for
    # them for good.
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:  # a file store cannot collide the way a port can
        # fork, not spawn: gloo needs no CUDA, and importing Megatron again in every rank costs 20 s
        # a test.
        mp.start_processes(
            _enter, (fn, world_size, folder, args, backend), nprocs=world_size, start_method="fork"
        )
        results = []
        for rank in range(world_size):
            results.append(pickle.loads((Path(folder) / f"{rank}.pkl").read_bytes()))
        return results


def _enter(
    rank: int,
    fn: Callable[..., Any],
    world_size: int,
    folder: str,
    args: tuple[Any, ...],
    backend: str,
) -> None:
    # What the tests' process holds, such as tensors of test modules, is not this rank's.
    gc.freeze()
    # A thread pool for each rank would fight over the two cores of a CI machine.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        # A rank whose function exchanges nothing would end, and close its connections, while
        # another still makes its own: "Gloo connectFullMesh failed ... Connection closed by peer".
        dist.barrier()
        result = fn(*args)
        (Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    finally:
        dist.destroy_process_group()
