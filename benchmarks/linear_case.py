"""Make one grouped linear with an adapter a benchmark case, which shows LoRA's cost without gather,
SwiGLU and combine around it.

Shape legend: M rows sorted by expert    E experts    N outputs    K inputs    R LoRA rank
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megalora_kernels import AugmentedWeight, grouped_lora
from torch import Tensor

from benchmarks.arms import (
    Arm,
    Build,
    Linear,
    base_linear,
    bridge_linear,
    loop_linear,
    merge_linear,
    of_autograd,
    quack_arms,
    room_bytes,
    split_linear,
)
from benchmarks.expert_case import SCALE, RoutingKind, Tensors, rows_per_expert


@dataclass(frozen=True)
class LinearSpec:
    """Sizes that distinguish one case from another."""

    label: str
    num_rows: int
    experts: int
    outputs: int
    inputs: int
    rank: int
    routing: RoutingKind = "balanced"

    def base_flops(self) -> int:
        """FLOPs of the frozen weights' GEMM in forward, 2 M N K; backward computes dX alone, with
        as many again."""
        return 2 * self.num_rows * self.outputs * self.inputs


PEFT_CASE = LinearSpec("peft #3577: 128 x 768 x 2048, 4096 rows, r=16", 4096, 128, 768, 2048, 16)
"""The case of huggingface/peft#3577, where forward and backward took 2.56 ms and 1.30 GB on one
H100 in bfloat16. From its memory (weights, a merged copy and that copy's gradient are 1.2 GB)
follows that it was one parameter, and 4,096 rows."""
PEFT_MS = 2.56
PEFT_GB = 1.30


@dataclass(frozen=True)
class LinearCase:
    """Operands of one grouped linear."""

    spec: LinearSpec
    offsets: Tensor
    """End of each expert's rows, int32 ``[E]``."""
    w: Tensor
    """``[E, N, K]``, frozen."""
    leaves: Tensors
    """x ``[M, K]``, a ``[E, R, K]``, b ``[E, N, R]``."""
    dout: Tensor
    """``[M, N]``."""


def make_linear(
    spec: LinearSpec, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> LinearCase:
    """Draw random operands; the adapter adds half of what the weight gives, as in
    ``expert_case.make_case``."""
    g = torch.Generator(device).manual_seed(seed)
    # Counts are drawn on the CPU, so that they are the same on every device.
    on_cpu = torch.Generator().manual_seed(seed)
    counts = rows_per_expert(spec.routing, spec.num_rows, spec.experts, on_cpu)
    ends = torch.tensor(counts).cumsum(0).int()
    M = spec.num_rows
    E = spec.experts
    N = spec.outputs
    K = spec.inputs
    R = spec.rank

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype).mul_(size)

    leaves = {
        "x": normal(M, K),
        "a": normal(E, R, K, size=K**-0.5),
        "b": normal(E, N, R, size=0.5 / SCALE * R**-0.5),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    return LinearCase(spec, ends.to(device), normal(E, N, K, size=K**-0.5), leaves, normal(M, N))


def linear_reference(case: LinearCase, adapters: bool) -> Tensors:
    """The output and every gradient in float32, one expert after the other, with the chain rule
    written out."""
    x = case.leaves["x"].detach()
    a = case.leaves["a"].detach()
    b = case.leaves["b"].detach()
    shapes = {"out": case.dout, "x": x}
    if adapters:
        shapes |= {"a": a, "b": b}
    want = {}
    for name, t in shapes.items():
        # Zeros: an expert without rows leaves zero gradients.
        want[name] = torch.zeros_like(t, dtype=torch.float32)
    j = 0
    for e, end in enumerate(case.offsets.tolist()):
        # Rows i to j are this expert's.
        i = j
        j = end
        xe = x[i:j].float()
        dy = case.dout[i:j].float()
        we = case.w[e].float()
        ae = a[e].float()
        be = b[e].float()
        want["out"][i:j] = xe @ we.T
        want["x"][i:j] = dy @ we
        if adapters:
            # y = x W^T + c s B^T with s = x A^T, so ds = c dy B, dA = ds^T x and dB = c dy^T s.
            s = xe @ ae.T
            ds = SCALE * dy @ be
            want["out"][i:j] += SCALE * s @ be.T
            want["x"][i:j] += ds @ ae
            want["a"][e] = ds.T @ xe
            want["b"][e] = SCALE * dy.T @ s
    return want


def ours_linear(case: LinearCase, backend: str | None, weight: Tensor | AugmentedWeight) -> Arm:
    """Our kernels with an adapter."""
    v = case.leaves

    # ``grouped_lora`` takes no scale, so it goes into B.
    def forward() -> Tensor:
        return grouped_lora(v["x"], weight, case.offsets, v["a"], v["b"] * SCALE, backend=backend)

    return of_autograd(
        "ours", forward, v, case.dout, waits=backend == "loop", room_bytes=room_bytes(weight)
    )


def linear_base(case: LinearCase, backend: str) -> Arm:
    """Our kernels without an adapter."""
    leaves = {"x": case.leaves["x"]}

    def forward() -> Tensor:
        return grouped_lora(leaves["x"], case.w, case.offsets, backend=backend)

    return of_autograd("base", forward, leaves, case.dout, gives="base", waits=backend == "loop")


def theirs_linear(case: LinearCase, linear: Linear, **how: Any) -> Arm:
    """Another way to compute the linear, one of ``benchmarks/arms.py``."""
    v = case.leaves

    def forward() -> Tensor:
        return linear(v["x"], case.w, v["a"], v["b"], case.offsets)

    leaves = v
    if how.get("gives") == "base":
        # Autograd would raise for factors that the base does not use.
        leaves = {"x": v["x"]}
    return of_autograd("theirs", forward, leaves, case.dout, **how)


def dense_linear(case: LinearCase) -> Arm:
    """One dense GEMM with the same FLOPs in each direction."""
    w = case.w[0]
    x = case.leaves["x"].detach()
    return Arm(
        "bound", lambda: x @ w.t(), lambda: {"out": x @ w.t(), "x": case.dout @ w}, gives=None
    )


def our_linear_arms(case: LinearCase) -> dict[str, Build]:
    joined = cache(lambda: AugmentedWeight(case.w, case.spec.rank))
    return {
        "base triton": lambda: linear_base(case, "triton"),
        "base grouped_mm": lambda: linear_base(case, "grouped_mm"),
        "base loop": lambda: linear_base(case, "loop"),
        "ours triton": lambda: ours_linear(case, "triton", case.w),
        "ours grouped_mm joined": lambda: ours_linear(case, "grouped_mm", joined()),
        "ours grouped_mm": lambda: ours_linear(case, "grouped_mm", case.w),
        "ours auto": lambda: ours_linear(case, None, joined()),
        "ours loop": lambda: ours_linear(case, "loop", case.w),
    }


def their_linear_arms(case: LinearCase) -> dict[str, Build]:
    joined = cache(lambda: AugmentedWeight(case.w, case.spec.rank))
    return {
        "dense bound": lambda: dense_linear(case),
        "base eager": lambda: theirs_linear(case, base_linear, gives="base"),
        "split eager": lambda: theirs_linear(case, split_linear),
        "bridge loop": lambda: theirs_linear(case, loop_linear, waits=True),
        "bridge grouped": lambda: theirs_linear(case, bridge_linear, waits=True),
        "peft merge": lambda: theirs_linear(case, merge_linear),
        **quack_arms(lambda: ours_linear(case, "grouped_mm", joined())),
    }
