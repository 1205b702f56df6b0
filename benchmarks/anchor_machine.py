"""Measure what a GPU does at best: bandwidths, the dense rate, the clock under load, launches.

A result is checked before it is timed.
"""

# A @triton.jit function is called with a grid and plain numbers for constexprs: Python's rules for
# calls do not hold.
# pyright: reportCallIssue=false, reportArgumentType=false

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from benchmarks.anchor_lab import Found, Lab, NotAvailableError, WrongResultError


def copy_bandwidth(lab: Lab) -> Found:
    """Terabytes per second, reads and writes together, of a copy of 1 GiB."""
    source = torch.arange(lab.size(2**28, 2**12), device=lab.device, dtype=torch.int32)
    target = torch.zeros_like(source)
    target.copy_(source)
    if not torch.equal(source, target):
        raise WrongResultError("a copy differs from what was copied")
    # A gigabyte is twenty times the L2, so nothing of it is found there.
    us = lab.us(lambda: target.copy_(source))
    # Twice the bytes: each is read and written.
    return Found(2 * source.numel() * source.element_size() / us / 1e6, {"us": us})


def dense_gemm(lab: Lab) -> Found:
    """TFLOP/s of one square product."""
    n = lab.size(8192, 64)
    x = lab.normal(n, n)
    w = lab.normal(n, n, size=n**-0.5)
    y = x @ w
    lab.check("64 rows of a dense product", y[:64], x[:64].float() @ w.float())
    us = lab.us(lambda: torch.mm(x, w, out=y))
    return Found(2 * n**3 / us / 1e6, {"us": us})


@triton.jit
def _read_kernel(x_ptr, out_ptr, num_blocks, passes, BLOCK: tl.constexpr):
    """Read one block of x in each pass, another one every time.

    The cache modifier ``.cg`` leaves L1 out: a block comes from L2, into which a program has
    brought it before.
    """
    block = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for _ in range(passes):
        total += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
        block = (block + 7) % num_blocks
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


def l2_bandwidth(lab: Lab) -> Found:
    """Terabytes per second of reading 24 MiB again and again: half the L2 of an H100; and 12
    MiB."""
    # An H100 has 50 MiB of L2 in two halves; what lies in the farther half comes more slowly. 12
    # MiB fit into either.
    rate = _reads_per_s(lab, 24)
    half = _reads_per_s(lab, 12)
    return Found(rate, {"tb_per_s_of_12_mib": half})


def _reads_per_s(lab: Lab, mebibytes: int) -> float:
    block = lab.size(4096, 64)
    passes = lab.size(500, 5)
    num_blocks = lab.size(mebibytes * 2**20 // 4 // 4096, 16)
    # As many programs as run at once: four of 256 threads for each multiprocessor.
    processors = 1
    if not lab.dry:
        processors = torch.cuda.get_device_properties(lab.device).multi_processor_count
    programs = 4 * processors
    x = torch.arange(num_blocks * block, device=lab.device, dtype=torch.int32) % 1000
    out = torch.empty(programs, block, device=lab.device, dtype=torch.int32)

    def run() -> None:
        _read_kernel[(programs,)](x, out, num_blocks, passes, BLOCK=block, num_warps=8)

    run()
    blocks = x.view(num_blocks, block)
    want = torch.zeros_like(out)
    first = torch.arange(programs, device=lab.device)
    for i in range(passes):
        want += blocks[(first + 7 * i) % num_blocks]
    if not torch.equal(out, want):
        raise WrongResultError("the sums of what was read are wrong")
    return programs * passes * block * 4 / lab.us(run) / 1e6


@triton.jit
def _nothing_kernel(x_ptr):
    tl.store(x_ptr + tl.program_id(0), 1)


def launch_overhead(lab: Lab) -> Found:
    """Microseconds that the host needs to launch a Triton kernel, and an operation of torch."""
    x = torch.zeros(1, device=lab.device, dtype=torch.int32)
    launches = lab.size(500, 5)

    def each(call: Callable[[], object]) -> float:
        # Once before: the first call compiles.
        call()
        _wait(lab)
        # The host does not wait for the device in between, so this is the host's time alone.
        before = time.perf_counter()
        for _ in range(launches):
            call()
        spent = time.perf_counter() - before
        _wait(lab)
        return 1e6 * spent / launches

    triton_us = each(lambda: _nothing_kernel[(1,)](x))
    if x.item() != 1:
        raise WrongResultError("a kernel did not write its 1")
    return Found(triton_us, {"torch_add_us": each(lambda: x.add_(1))})


def clock(lab: Lab) -> Found:
    """GHz of the multiprocessors under load, from nvidia-smi; what else it says of the card."""
    if lab.dry:
        return Found(0.0)
    if shutil.which("nvidia-smi") is None:
        raise NotAvailableError("nvidia-smi is not on the PATH")
    n = 8192
    x = lab.normal(n, n)
    y = lab.normal(n, n)
    # The host queues 0.8 s of work and goes on to ask, so the clock is read while the GPU computes:
    # idle, it would be lower.
    for _ in range(600):
        torch.mm(x, x, out=y)
    fields = (
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.draw",
        "power.limit",
        "temperature.gpu",
    )
    query = [
        "nvidia-smi",
        f"--query-gpu={','.join(fields)},driver_version",
        "--format=csv,noheader,nounits",
    ]
    # By its UUID: nvidia-smi counts all cards of the host, torch those that CUDA_VISIBLE_DEVICES
    # leaves.
    uuid = str(torch.cuda.get_device_properties(lab.device).uuid).removeprefix("GPU-")
    query.append(f"--id=GPU-{uuid}")
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    _wait(lab)
    return read_clock(done.stdout, (*fields, "driver"))


def read_clock(said: str, fields: Sequence[str]) -> Found:
    """The first of the values that nvidia-smi prints, in GHz, and all of them by name."""
    # In a container it may print "[N/A]" or an error in the place of numbers.
    values = [text.strip() for text in said.strip().split(",")]
    if len(values) != len(fields) or not values[0].isdigit():
        raise NotAvailableError(f"nvidia-smi does not tell the clock: {said.strip()[:80]!r}")
    return Found(float(values[0]) / 1e3, dict(zip(fields, values, strict=True)))


def _wait(lab: Lab) -> None:
    if lab.device.type == "cuda":
        torch.cuda.synchronize()
