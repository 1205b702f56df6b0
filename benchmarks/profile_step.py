"""Train a few steps under torch's profiler and summarise what they did (``step_trace.py``)."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_timing import first_line
from benchmarks.step_trace import STEP, UPDATE, analyse, read_trace
from benchmarks.train_arms import Training

STEPS = 2
"""Steps that are recorded; all numbers are per step."""


def profile_steps(training: Training, device: torch.device, layers: int) -> dict[str, Any]:
    """Return what ``STEPS`` steps did; ``problem`` alone where the profiler cannot run here.

    The profiler slows the host, so gaps are wider than without it: compare ``busy_us`` with the
    time of a step that was not profiled.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            with profile(activities=activities) as profiler:
                # The first step under the profiler loads its library, which takes seconds.
                _step(training, device)
                for _ in range(STEPS):
                    # No wait inside the annotation: it would be counted among the step's own.
                    with record_function(STEP):
                        _step(training, device, wait=False)
                    if on_gpu:
                        torch.cuda.synchronize()
            profiler.export_chrome_trace(str(path))
            return analyse(read_trace(path), layers)
    except (RuntimeError, ValueError) as error:
        return {"problem": first_line(error)}


def _step(training: Training, device: torch.device, wait: bool = True) -> None:
    training.forward_backward()
    with record_function(UPDATE):
        training.update()
    if wait and device.type == "cuda":
        torch.cuda.synchronize()
