"""Define the anchors: what the GPU does at best, then our first products and passes, each with the
value that is expected of it.

Expectations come from the tile model and from traffic with HBM, so that a wrong assumption of
theirs is found by name. A result is checked before it is timed.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank   I expert intermediate
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from megalora_kernels.gemm_kernel import grouped_gemm_triton
from megalora_kernels.routing import Routing
from megalora_kernels.sums import TritonSums
from megalora_kernels.swiglu import swiglu_ref, swiglu_triton
from megalora_kernels.swiglu_backward import swiglu_backward_triton
from megalora_kernels.variants import Product, Variant, rule
from torch import Tensor

from benchmarks.anchor_lab import Anchor, Expected, Found, Lab
from benchmarks.anchor_machine import (
    clock,
    copy_bandwidth,
    dense_gemm,
    l2_bandwidth,
    launch_overhead,
)
from benchmarks.arms import grouped_mm
from benchmarks.tile_gpus import Gpu
from benchmarks.tile_model import SIZE, cost, last_release

# Qwen3-30B-A3B, with the rank that the other benchmarks have too.
HIDDEN = 2048
INNER = 768
RANK = 16


# ---- grouped products ----------------------------------------------------------------------------


def balanced(lab: Lab, experts: int, rows: int, gathered: bool) -> tuple[Routing, Tensor | None]:
    """Routing that gives every expert as many rows; with ``gathered`` also the token of each row,
    in random order."""
    offsets = rows * torch.arange(1, experts + 1, device=lab.device, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    # Each token stands behind eight rows, one for each of its experts.
    tokens = torch.randperm(experts * rows, generator=generator) // 8
    source = tokens.to(lab.device, torch.int32) if gathered else None
    return Routing(offsets, experts * rows), source


@dataclass(frozen=True)
class Shape:
    """gate_up forward without an adapter: number of experts, and of rows for each."""

    experts: int
    rows: int
    gathered: bool

    @property
    def product(self) -> Product:
        return Product("forward", torch.bfloat16, 2 * INNER, HIDDEN, 0, self.gathered, self.rows)


E128_512 = Shape(128, 512, True)
E16_4096 = Shape(16, 4096, False)
E128_64 = Shape(128, 64, True)


def base_gemm(shape: Shape, choose: Callable[[Product], Variant]) -> Callable[[Lab], Found]:
    """Measure the Triton grouped GEMM by one variant; in a dry run by the same one with small
    tiles."""

    def run(lab: Lab) -> Found:
        experts = lab.size(shape.experts, 3)
        rows = lab.size(shape.rows, 24)
        N = lab.size(2 * INNER, 96)
        K = lab.size(HIDDEN, 64)
        routing, source = balanced(lab, experts, rows, shape.gathered)
        x = lab.normal(routing.num_rows, K)
        w = lab.normal(experts, N, K, size=K**-0.5)
        w_EKN = w.transpose(1, 2)
        variant = choose(shape.product)
        if lab.dry:
            variant = replace(variant, block_m=16, block_n=32, block_k=32)

        def call() -> Tensor:
            return grouped_gemm_triton(x, w_EKN, routing, source_M=source, variant=variant)

        y = call()
        # The first expert and the last: a wrong offset would show at the end.
        for e in (0, experts - 1):
            mine = slice(e * rows, (e + 1) * rows)
            taken = x[mine] if source is None else x[source[mine].long()]
            lab.check(f"expert {e}'s product", y[mine], taken.float() @ w[e].float().t())
        times = lab.times(call)
        us = 1e3 * times.median_ms
        tflops = 2 * routing.num_rows * N * K / us / 1e6
        return Found(
            us, {"tflops": tflops, "host_us": 1e3 * times.host_ms, "variant": asdict(variant)}
        )

    return run


def joined_grouped_mm(lab: Lab) -> Found:
    """Measure torch's grouped GEMM over ``[x | S]`` and ``[W | B]``, 16 experts x 4,096 rows."""
    experts = lab.size(16, 3)
    rows = lab.size(4096, 24)
    N = lab.size(2 * INNER, 96)
    # Beside the hidden size the stacked ranks of gate and up.
    K = lab.size(HIDDEN, 64) + 2 * RANK
    routing, _ = balanced(lab, experts, rows, False)
    x = lab.normal(routing.num_rows, K)
    w = lab.normal(experts, N, K, size=K**-0.5)

    def call() -> Tensor:
        return grouped_mm(x, w.transpose(1, 2), offs=routing.offsets_E)

    y = call()
    for e in (0, experts - 1):
        mine = slice(e * rows, (e + 1) * rows)
        lab.check(f"expert {e}'s product", y[mine], x[mine].float() @ w[e].float().t())
    us = lab.us(call)
    # The base's FLOPs alone.
    return Found(us, {"tflops": 2 * routing.num_rows * N * (K - 2 * RANK) / us / 1e6})


# ---- SwiGLU --------------------------------------------------------------------------------------


@dataclass
class SwiGLUCase:
    """Operands of SwiGLU's passes: y [M, 2I], p [M], a [E, R, I], dh [M, I], S of gate_up [M, 2R],
    dS of down [M, R]."""

    routing: Routing
    y: Tensor
    p: Tensor
    a: Tensor
    dh: Tensor
    s: Tensor
    ds: Tensor

    @classmethod
    def of(cls, lab: Lab) -> "SwiGLUCase":
        experts = lab.size(16, 3)
        rows = lab.size(4096, 24)
        inner = lab.size(INNER, 48)
        routing, _ = balanced(lab, experts, rows, False)
        M = routing.num_rows
        p = torch.linspace(0.1, 1.0, M, device=lab.device, dtype=torch.float32).to(lab.dtype)
        return cls(
            routing, lab.normal(M, 2 * inner), p,
            lab.normal(experts, RANK, inner, size=inner**-0.5),
            lab.normal(M, inner), lab.normal(M, 2 * RANK), lab.normal(M, RANK),
        )  # fmt: skip


def swiglu_forward(lab: Lab) -> Found:
    """h = silu(gate) up p, and S = h Aᵀ, for 65,536 rows."""
    case = SwiGLUCase.of(lab)
    # NaN: an entry that the kernel leaves out fails the check.
    h = torch.full_like(case.dh, float("nan"))
    s = torch.full_like(case.ds, float("nan"))

    def call() -> None:
        swiglu_triton(case.y, case.p, case.a, case.routing, h, s)

    call()
    want = swiglu_ref(case.y.float(), case.p.float())
    lab.check("h", h, want)
    for e, i, j in (case.routing.spans()[0], case.routing.spans()[-1]):
        lab.check(f"S of expert {e}", s[i:j], h[i:j].float() @ case.a[e].float().t())
    return Found(lab.us(call))


def swiglu_backward(lab: Lab) -> Found:
    """dgate, dup and dp; dB of gate and up and dA of down with them, their parts added."""
    case = SwiGLUCase.of(lab)
    inner = case.dh.shape[1]
    dy = torch.full_like(case.y, float("nan"))

    def call() -> tuple[Tensor | None, list[Tensor | None]]:
        # Room for the parts of dA and of both dB, which programs write and ``finish`` adds up.
        sums = TritonSums(case.routing, case.y, [(RANK, inner), (inner, RANK), (inner, RANK)])
        da, *db = sums.places
        swiglu_backward_triton(
            case.dh, case.y, case.p, case.routing, dy, case.s, case.ds, sums, da, db
        )  # fmt: skip
        return sums.finish()

    dp, (da, db_gate, db_up) = call()
    assert dp is not None and da is not None and db_gate is not None and db_up is not None
    y = case.y.float().requires_grad_()
    p = case.p.float().requires_grad_()
    want_y, want_p = torch.autograd.grad(swiglu_ref(y, p), (y, p), case.dh.float())
    lab.check("dgate and dup", dy, want_y)
    lab.check("dp", dp, want_p)
    h = swiglu_ref(y, p).detach()
    for e, i, j in (case.routing.spans()[0], case.routing.spans()[-1]):
        s = case.s[i:j].float()
        lab.check(f"dB of gate of expert {e}", db_gate[e], want_y[i:j, :inner].t() @ s[:, :RANK])
        lab.check(f"dB of up of expert {e}", db_up[e], want_y[i:j, inner:].t() @ s[:, RANK:])
        lab.check(f"dA of expert {e}", da[e], case.ds[i:j].float().t() @ h[i:j])
    return Found(lab.us(call))


# ---- what is expected ----------------------------------------------------------------------------


def around(value: float, share: float) -> Expected:
    return Expected(value, value * (1 - share), value * (1 + share))


def of_model(shape: Shape, choose: Callable[[Product], Variant]) -> Callable[[Gpu], Expected]:
    """Expect the tile model's time, 15 % either way: three times as much as the model may be off
    the times that others published (``tile_model.TOLERANCE``)."""
    return lambda gpu: around(
        cost(choose(shape.product), shape.product, shape.experts, gpu).us, 0.15
    )


def traffic_us(gpu: Gpu, elements: float) -> float:
    return elements * SIZE / gpu.hbm_tb_per_s.value / 1e6


def of_pass(elements_of_row: float, slack: float) -> Callable[[Gpu], Expected]:
    """Expect of a pass over 65,536 rows (16 experts x 4,096) between its traffic and ``slack``
    times that."""

    def expect(gpu: Gpu) -> Expected:
        # 5 % below the floor for what HBM's measured rate may be off; less would mean that the
        # pass moves less than was counted.
        floor = traffic_us(gpu, 65536 * elements_of_row)
        return Expected(1.05 * floor, 0.95 * floor, slack * floor)

    return expect


def tma_weight(product: Product) -> Variant:
    return replace(rule(product), weight="tma")


L2_MEANING = (
    "the tile model's L2 constant is {}: run `python -m benchmarks.tile_model --l2-tb-per-s` with"
    " the measured one"
)
SLOW_GEMM = (
    "more than L2 and HBM binds: registers, issue slots or the order of tiles; look at the profile"
)
FAST_GEMM = "L2 binds less than assumed: compare with the L2 anchor"


def _gemm(
    name: str, shape: Shape, choose: Callable[[Product], Variant], slow: str = SLOW_GEMM
) -> Anchor:
    return Anchor(name, "us", base_gemm(shape, choose), of_model(shape, choose), FAST_GEMM, slow)


ANCHORS = (
    Anchor("copy of 1 GiB", "TB/s", copy_bandwidth, lambda gpu: around(gpu.hbm_tb_per_s.value, 0.1),
           "every floor by HBM is too low by as much", "every floor by HBM is too high by as much"),
    Anchor("dense bf16 8192^3", "TFLOP/s", dense_gemm,
           lambda gpu: Expected(gpu.dense_tflops.value, 680, 830),
           "the card is throttled or shared: look at the clock",
           "another card than an H100 or H200"),
    Anchor("L2 reads of 24 MiB", "TB/s", l2_bandwidth,
           lambda gpu: around(gpu.l2_tb_per_s.value, 0.2),
           L2_MEANING.format("too high"),
           L2_MEANING.format("too low") + "; above 10, 128 x 128 tiles are nearly as good"),
    Anchor("clock under load", "GHz", clock, lambda gpu: Expected(gpu.clock_ghz.value, 1.4, 1.98),
           "a power or heat limit: times are longer by as much", "not possible on this card"),
    Anchor("launch of a Triton kernel", "us of the host", launch_overhead,
           lambda _: Expected(10, 3, 20),
           "the host is faster than assumed", "launches bind at few tokens: capture a graph"),
    _gemm("base E16 x 4096, the last release's tile", E16_4096, last_release),
    _gemm("base E128 x 512, the rule", E128_512, rule),
    _gemm("base E16 x 4096, the rule", E16_4096, rule),
    _gemm("base E16 x 4096, weights by TMA", E16_4096, tma_weight),
    _gemm("base E128 x 64, the rule", E128_64, rule,
          "weights are read more than once: the order of tiles"),
    Anchor("torch grouped_mm joined, E16 x 4096", "us", joined_grouped_mm,
           lambda _: Expected(644, 580, 720),
           "tuned.RULE_VENDOR_FROM may be lower", "tuned.RULE_VENDOR_FROM may be higher"),
    Anchor("SwiGLU + shrink, 65,536 rows", "us", swiglu_forward, of_pass(3 * INNER + RANK, 1.2),
           "less is moved than counted",
           "arithmetic binds: the activation is computed more than once"),
    Anchor("SwiGLU backward, 65,536 rows", "us", swiglu_backward,
           of_pass(5 * INNER + 3 * RANK, 1.25),
           "less is moved than counted", "arithmetic binds: 4 warps, or 128 columns"),
)  # fmt: skip
