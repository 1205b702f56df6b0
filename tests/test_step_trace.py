"""Read traces of a profiler: a small one written by hand, and a real one of a step on the CPU."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.model_plan import error_percent, machine_of, planned
from benchmarks.profile_step import profile_steps
from benchmarks.step_trace import (
    BACKWARD,
    STEP,
    UPDATE,
    Span,
    analyse,
    busy_and_gaps,
    read_trace,
)
from benchmarks.train_arms import Setup, Training
from benchmarks.train_case import QWEN3_30B_A3B, TINY_MODEL
from megalora.config import LoRAConfig, ParallelConfig
from megalora.model.fields import model_shape
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import CONTEXT, memory_of
from megalora.planner.workload import Workload

CPU = torch.device("cpu")
# Threads of the host and a stream of the device, as a trace numbers them.
MAIN = 11
AUTOGRAD = 12
STREAM = 7


def event(
    cat: str, name: str, ts: float, dur: float, tid: int, correlation: int | None = None
) -> dict:
    """An event of a trace: microseconds from ``ts`` on; ``correlation`` ties a kernel to its
    launch."""
    args = {}
    if correlation is not None:
        args["correlation"] = correlation
    where = {"pid": 1, "tid": tid}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, **where, "args": args}


def launch(number: int, at: float, thread: int, kernel: str, begin: float, us: float) -> list[dict]:
    """A kernel, and the call that launched it; half of them as Triton does it."""
    how = ("cuda_runtime", "cudaLaunchKernel")
    if number % 2:
        how = ("cuda_driver", "cuLaunchKernelEx")
    return [event(*how, at, 2, thread, number), event("kernel", kernel, begin, us, STREAM, number)]


TRACE = {"traceEvents": [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    # Before the step: a warm-up that must not count.
    *launch(1, 5, MAIN, "gemm", 6, 400),
    event("user_annotation", STEP, 1000, 1000, MAIN),
    event("gpu_user_annotation", STEP, 1000, 1000, STREAM),
    # Forward: two layers, each with one gemm of 100 us and one norm of 10, and a loss outside of
    # them.
  
    *launch(2, 1010, MAIN, "gemm", 1020, 100),
    *launch(3, 1020, MAIN, "norm", 1120, 10),
    *launch(4, 1030, MAIN, "gemm", 1130, 100),
    *launch(5, 1040, MAIN, "norm", 1230, 10),
    event("cpu_op", "aten::nll_loss", 1050, 10, MAIN),
    *launch(6, 1052, MAIN, "loss", 1245, 5),  # 5 us after the norm
    # Backward on autograd's thread: both gemms, the second of them beside a copy that overlaps it.
    event("cpu_op", f"{BACKWARD}: MmBackward0", 1300, 100, AUTOGRAD),
    event("cpu_op", "aten::mm", 1310, 10, AUTOGRAD),
    *launch(7, 1312, AUTOGRAD, "gemm", 1350, 100),  # 100 us after the loss
    *launch(8, 1330, AUTOGRAD, "gemm", 1450, 100),
    event("cuda_runtime", "cudaMemcpyAsync", 1340, 5, AUTOGRAD, 9),
    # ends 30 us after the gemm
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1500, 80, 8, 9),
    # What reduces gradients, on the main thread again.
    *launch(10, 1600, MAIN, "reduce", 1610, 20),  # 30 us after the copy
    event("user_annotation", UPDATE, 1700, 200, MAIN),
    event("cpu_op", "aten::item", 1705, 60, MAIN),
    event("cpu_op", "aten::_local_scalar_dense", 1706, 58, MAIN),
    event("cuda_runtime", "cudaStreamSynchronize", 1710, 50, MAIN, 11),
    *launch(12, 1800, MAIN, "adam", 1810, 30),
    # After the step: the measurement's own wait.
    event("cuda_runtime", "cudaDeviceSynchronize", 2100, 500, MAIN, 13),
]}  # fmt: skip


@pytest.fixture
def found(tmp_path) -> dict:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(TRACE))
    return analyse(read_trace(path), layers=2)


def test_kernels_of_each_phase_and_layer(found):
    # Per layer: whole kernels of two layers, so that the loss and the reduction are of none.
    assert found["phases"] == {
        "forward": {"count": 5, "per_layer": 2, "us": 225},
        "backward": {"count": 2, "per_layer": 1, "us": 200},
        "after backward": {"count": 1, "per_layer": 0, "us": 20},
        "update": {"count": 1, "per_layer": 0, "us": 30},
    }
    columns = ("name", "phase", "count", "per_layer", "us")
    rows = []
    for row in found["kernels"]:
        rows.append(tuple(row[column] for column in columns))
    assert rows[:2] == [("gemm", "forward", 2, 1, 200), ("gemm", "backward", 2, 1, 200)]
    assert ("norm", "forward", 2, 1, 20) in rows and ("loss", "forward", 1, 0, 5) in rows
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
    # Of 225 + 200 + 20 + 30 us.
    assert found["kernels"][0]["share"] == pytest.approx(200 / 475)


def test_gaps_are_between_all_that_the_device_does(found):
    """By hand: 1020 to 1240, 1245 to 1250, 1350 to 1580 (the copy overlaps), 1610 to 1630, 1810 to
    1840."""
    assert found["busy_us"] == 220 + 5 + 230 + 20 + 30
    assert found["idle_us"] == 5 + 100 + 30 + 180
    assert found["idle_share"] == pytest.approx(315 / 820)
    # From the first kernel at 1020 to the last one's end at 1840. Five microseconds are no gap.
    assert found["notable_gaps"] == 3
    assert found["largest_gaps"][0] == {"us": 180, "after": "reduce", "before": "adam"}
    copy = "Memcpy HtoD (Pinned -> Device)"
    assert found["largest_gaps"][2] == {"us": 30, "after": copy, "before": "reduce"}
    assert found["copies"] == {copy: {"count": 1, "us": 80}}
    assert found["host_us"] == 1000


def test_waits_of_the_host_inside_the_step_alone(found):
    # Named by the innermost operation around it; the wait after the step is the profiler's own.
    wait = {"count": 1, "us": 50, "in": {"update: aten::_local_scalar_dense": 1}}
    assert found["waits"] == {"cudaStreamSynchronize": wait}


def test_several_steps_are_averaged(tmp_path):
    """A second step a second later, as long and with the same kernels."""
    # All events but the process's name and the two of the warm-up, with launches of their own.
    later = []
    for first in TRACE["traceEvents"][3:]:
        again = {**first, "ts": first["ts"] + 1e6}
        if "correlation" in first["args"]:
            again["args"] = {"correlation": first["args"]["correlation"] + 100}
        later.append(again)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": TRACE["traceEvents"] + later}))
    found = analyse(read_trace(path), layers=2)
    assert found["steps"] == 2
    assert found["phases"]["forward"] == {"count": 5, "per_layer": 2, "us": 225}
    # The second between the steps is no idle time of either.
    assert found["idle_us"] == 315 and found["waits"]["cudaStreamSynchronize"]["count"] == 1


def test_work_that_overlaps_is_counted_once():
    """A long kernel holds two short ones: there is no gap before its end."""
    spans = [
        Span("x", 0, 100, "kernel", STREAM, None),
        Span("y", 10, 20, "kernel", STREAM, None),
        Span("z", 30, 110, "kernel", STREAM, None),
        Span("last", 115, 120, "kernel", STREAM, None),
    ]
    # 110 and 5 us busy; 5 us between z, the last to end, and the next.
    assert busy_and_gaps(spans) == (115, [(5, "z", "last")])
    assert busy_and_gaps([]) == (0.0, [])


def test_files_that_are_no_traces(tmp_path):
    path = tmp_path / "trace.json"
    for text in ("{", "[]", "{}", '{"traceEvents": [{"ph": "X"}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"trace.json is not a trace of torch's profiler"):
            read_trace(path)
    with pytest.raises(ValueError, match="no step is annotated"):
        analyse([], layers=1)


def small_training() -> Training:
    """Two linears, whose backward has three products: one for each weight, one between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 8)

    def forward_backward() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    return Training(forward_backward, optimizer.step, 128, "")


def test_phases_of_a_real_profile(tmp_path, monkeypatch):
    """On a CPU the profiler sees no launches: each product of the recorded step is given one."""
    kept = []

    def keep(spans, layers):
        kept.append(spans)
        return {}

    monkeypatch.setattr("benchmarks.profile_step.analyse", keep)
    profile_steps(small_training(), CPU, layers=2)
    (spans,) = kept
    products = [span for span in spans if span.name == "aten::mm"]
    made = []
    for number, product in enumerate(products):
        call = replace(
            product, name="cudaLaunchKernel", category="cuda_runtime", correlation=number
        )
        # Three microseconds each.
        made += [call, replace(call, name="gemm", category="kernel", end=call.begin + 3)]
    found = analyse([*spans, *made], layers=1)
    assert found["steps"] == 2, "the first step only warms up"
    counts = {name: phase["count"] for name, phase in found["phases"].items()}
    assert counts == {"forward": 2, "backward": 3, "after backward": 0, "update": 0}
    assert found["phases"]["backward"]["us"] == pytest.approx(9)
    # Without a kernel there is nothing that could be idle.
    assert analyse(spans, layers=1)["idle_share"] is None


def test_a_profiler_that_cannot_run_is_said_in_the_row():
    def step() -> torch.Tensor:
        raise RuntimeError("CUPTI\nis gone")

    broken = Training(step, lambda: None, 1, "")
    assert profile_steps(broken, CPU, 1) == {"problem": "RuntimeError: CUPTI"}


def test_the_planner_is_asked_for_the_very_configuration():
    config = {**QWEN3_30B_A3B, "num_hidden_layers": 8}
    said = planned(Setup(config, 16, 4096, CPU), machine_of("NVIDIA H200"))
    lora = LoRAConfig(rank=16, alpha=32.0)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    work = Workload(sequence_length=4096, global_batch_size=1)
    plan = memory_of(model_shape(config), lora, layout, work)
    assert said["peak_bytes"] == plan.peak_bytes - plan[CONTEXT]
    # 8 layers of 1.25 GB of weights each, embedding and head, and what is trained.
    assert 12 * 2**30 < said["peak_bytes"] < 30 * 2**30
    assert said["step_ms"] == pytest.approx(sum(said["parts_ms"].values()))
    assert 20 < said["step_ms"] < 2000, "milliseconds"
    assert said["machine"].startswith("H200") and machine_of("CPU").name.startswith("H100")
    fewer = planned(Setup(TINY_MODEL, 8, 32, CPU), machine_of("NVIDIA H100 80GB HBM3"))
    assert fewer["peak_bytes"] < said["peak_bytes"] / 1000


def test_errors_are_percent_of_what_was_measured():
    assert error_percent(110.0, 100.0) == pytest.approx(10)
    assert error_percent(50.0, 100.0) == pytest.approx(-50)
    assert error_percent(1.0, None) is None
