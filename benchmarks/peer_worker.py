"""Run one arm of the comparison in a process of its own, which takes its turn when it is told to.

Each arm needs a process because libraries change each other: Unsloth changes transformers, and
Bridge's layer file and megalora's stand-ins for it cannot both be imported. A worker that waits for
its turn takes no processor time.
"""

import importlib
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import first_line
from benchmarks.peer_case import PeerArm
from benchmarks.train_arms import Setup

ARMS = {
    "megalora": "benchmarks.peer_megatron:megalora",
    "peft": "benchmarks.peer_transformers:peft",
    "unsloth": "benchmarks.peer_transformers:unsloth",
    "bridge per expert": "benchmarks.peer_megatron:bridge_per_expert",
    "bridge default": "benchmarks.peer_megatron:bridge_default",
    "bridge grouped": "benchmarks.peer_megatron:bridge_grouped",
    "grouped_mm composed": "benchmarks.peer_megatron:composed",
}
"""Arm to the function that builds it, the most wanted first: time may run out."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one step: forward and backward, and the whole with the optimizer's update."""

    passes: float
    step: float
    passes_cpu: float
    """Processor time of this process in ``passes``."""
    step_cpu: float
    """The same in ``step``."""


class ArmFailed(Exception):
    """An arm that cannot go on; the text is its row's status."""


def status_of(error: BaseException) -> str:
    """What a row says of an exception."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"cannot run: {first_line(error)}"


def work(connection: Connection, name: str, setup: Setup, threads: int) -> None:
    """Import, build when told to, then answer commands until the connection ends."""
    # Libraries write progress bars to stdout, among the lines of the comparison.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(threads)
    module, function = ARMS[name].split(":")
    try:
        build = getattr(importlib.import_module(module), function)
        # Imported, which takes the time; weights are drawn when memory is there for them.
        connection.recv()
        with build(setup) as arm:
            connection.send(("ok", _described(arm)))
            _serve(connection, arm, setup)
    except (EOFError, BrokenPipeError):
        # The comparison has ended.
        return
    except Exception as error:
        # Another library's failure is what its row says. What a row says whole needs no traceback.
        if not isinstance(error, ModuleNotFoundError | torch.OutOfMemoryError):
            traceback.print_exc()
        connection.send(("failed", status_of(error)))


def _described(arm: PeerArm) -> dict[str, Any]:
    """What the row of an arm says before anything is timed."""
    weights = 0
    for parameter in arm.model.parameters():
        if not parameter.requires_grad:
            weights += parameter.numel() * parameter.element_size()
    return {
        "note": arm.training.note,
        "same_factors": arm.same_factors,
        "adapter_parameters": arm.training.num_adapter_parameters,
        "weight_bytes": weights,
    }


def _serve(connection: Connection, arm: PeerArm, setup: Setup) -> None:
    """Answer commands until the other side closes the connection, which ``recv`` raises."""
    commands: dict[str, Callable[..., Any]] = {
        "prove": lambda steps: prove(arm, steps),
        "turn": lambda _: turn(arm),
        "peak": lambda _: peak_bytes(arm, setup.device),
    }
    while True:
        command, argument = connection.recv()
        connection.send(("ok", commands[command](argument)))


def prove(arm: PeerArm, steps: int) -> list[float]:
    """Losses before each of ``steps`` updates, with A's that read one input kept equal."""
    losses: list[Tensor] = []
    for _ in range(steps):
        losses.append(arm.training.forward_backward())
        arm.tied.add_up()
        arm.training.update()
    # Read at the end: each would wait for the device.
    return [float(loss) for loss in losses]


def turn(arm: PeerArm) -> Sample:
    """One training step as the library takes it, timed."""
    from megalora.host import Stopwatch, seconds_between, synchronize

    # What another arm has left on the device's queue is not this step's.
    synchronize()
    begun = Stopwatch.mark()
    cpu_begun = time.process_time()
    arm.training.forward_backward()
    middle = Stopwatch.mark()
    cpu_middle = time.process_time()
    arm.training.update()
    end = Stopwatch.mark()
    cpu_end = time.process_time()
    return Sample(
        passes=seconds_between(begun, middle),
        step=seconds_between(begun, end),
        passes_cpu=cpu_middle - cpu_begun,
        step_cpu=cpu_end - cpu_begun,
    )


def peak_bytes(arm: PeerArm, device: torch.device) -> int:
    """Memory at the highest point of one step, frozen weights included; on a CPU the bytes of live
    tensors."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        turn(arm)
        return torch.cuda.max_memory_allocated()
    from megalora.bench.live import LiveTensors

    with LiveTensors([*arm.model.parameters(), *arm.model.buffers()]) as live:
        arm.training.forward_backward()
        arm.training.update()
    # Buffers of gradients and the optimizer's state were there before and are not among the
    # module's tensors.
    return live.peak_bytes + live.unknown_bytes
