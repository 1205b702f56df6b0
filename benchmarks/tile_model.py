"""Predict what a variant of the grouped GEMM must cost on an H100 or H200.

    python -m benchmarks.tile_model                     every product of a layer of Qwen3-30B-A3B
    python -m benchmarks.tile_model --gpu h200 --rank 32
    python -m benchmarks.tile_model --l2-tb-per-s 10    with the L2 bandwidth from anchors.py

Three things overlap while a tile is computed: the tensor cores multiply, their operands are read
from shared memory, and copies from L2 fill it. The tile takes as long as the slowest of them, and
before and after it a prologue and an epilogue that nothing hides. The whole product takes no less
than its traffic with HBM. The model does not know how an operand is loaded (by pointers or TMA)
beyond the registers that this takes, and assumes balanced experts. Its predictions are to be set
beside what tune.py and bench_grouped_lora.py measure.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank
"""

import argparse
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from megalora_kernels.variants import Product, Variant, candidates, rule, shared_bytes, tile_rank

from benchmarks.gpu_timing import table
from benchmarks.tile_gpus import GPUS, H100, Constant, Gpu
from benchmarks.tune_points import variant_label

Bound = Literal["tensor cores", "shared memory", "L2", "HBM"]
SIZE = 2
"""Bytes of bfloat16."""

# Shares of a tile's ends that stay visible, assumed: other programs of the same SM work meanwhile,
# or, in a persistent program, the copies for the next tile begin before this one's epilogue.
VISIBLE_SHARED_SM = 0.25
VISIBLE_PERSISTENT = 0.6
# Limits of compute capability 9.0 (CUDA C programming guide, table of technical specifications).
SHARED_OF_SM = 233472
SHARED_RESERVED = 1024
REGISTERS_OF_SM = 65536
REGISTERS_OF_THREAD = 255
# One wgmma instruction multiplies 64 rows by up to 256 columns over 16 terms in bfloat16 (PTX ISA).
WGMMA_ROWS = 64
WGMMA_DEPTH = 16


# ---- one tile ------------------------------------------------------------------------------------


def programs_per_sm(variant: Variant, product: Product) -> int:
    """How many programs fit one SM; 0: none. Registers beside the accumulator are an estimate from
    compiled variants."""
    threads = 32 * variant.num_warps
    # The tile's sums stay in registers, a float32 each, divided over the program's threads: 128 x
    # 256 over 8 warps are 128 for each thread.
    accumulator = variant.block_m * variant.block_n // threads
    addresses = 40 if variant.rows == "tma" else 60
    registers = accumulator + addresses + (45 if variant.persistent else 0)
    # The compiler would spill to memory, which costs more than any tile gains.
    if registers > REGISTERS_OF_THREAD:
        return 0
    by_registers = REGISTERS_OF_SM // (registers * threads)
    by_shared = SHARED_OF_SM // (shared_bytes(variant, product) + SHARED_RESERVED)
    return min(by_registers, by_shared)


def tile_cycles(variant: Variant, depth: float, gpu: Gpu) -> dict[Bound, float]:
    """Clock cycles that each unit of one SM needs for a tile of ``depth`` terms."""
    m = variant.block_m
    n = variant.block_n
    flops = 2 * m * n * depth
    # A warp group multiplies 64 rows at a time. Two groups on the same 64 rows share the columns,
    # and both read the rows.
    groups = variant.num_warps // 4
    blocks_of_rows = max(1, m // WGMMA_ROWS)
    columns = n if blocks_of_rows >= groups else n * blocks_of_rows // groups
    instructions = depth / WGMMA_DEPTH * (m / WGMMA_ROWS) * (n / columns)
    # Every instruction reads its rows and its columns from shared memory; nothing is kept.
    read = instructions * SIZE * WGMMA_DEPTH * (WGMMA_ROWS + columns)
    # The tile's part of x, [m, depth], and of the weight, [n, depth], each arrive once.
    copied = SIZE * depth * (m + n)
    return {
        "tensor cores": flops / gpu.flops_per_cycle,
        "shared memory": (read + copied) / gpu.shared_bytes_per_cycle.value,
        "L2": copied / gpu.l2_bytes_per_cycle,
    }


# ---- one product ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """The prediction for one product."""

    us: float
    bound: Bound
    tflops: float
    """Of the base's 2 M N K alone."""


def floor_us(product: Product, experts: int, gpu: Gpu = H100) -> float:
    """The traffic with HBM: weights once, rows in, rows out, and the adapter's S and B."""
    rows = experts * product.rows_per_expert
    # [x | S] times [W | B]: the adapter adds its rank to the terms of every sum.
    depth = product.K + product.rank
    moved = SIZE * (rows * (depth + product.N) + experts * depth * product.N)
    # Bytes over TB/s, in microseconds.
    return moved / gpu.hbm_tb_per_s.value / 1e6


def cost(variant: Variant, product: Product, experts: int, gpu: Gpu = H100) -> Cost:
    """Predict one grouped product with balanced experts.

    Raises:
        ValueError: the variant fits no SM.
    """
    per_sm = programs_per_sm(variant, product)
    if per_sm == 0:
        raise ValueError(
            f"{variant_label(variant)} needs more registers or shared memory than an SM has; take a"
            " smaller tile"
        )
    # An expert's last tile is computed whole, however few of its rows there are.
    blocks_of_rows = math.ceil(product.rows_per_expert / variant.block_m)
    blocks_of_columns = math.ceil(product.N / variant.block_n)
    tiles = experts * blocks_of_rows * blocks_of_columns
    cycles = tile_cycles(variant, product.K + tile_rank(product.rank), gpu)
    bound = max(cycles, key=lambda unit: cycles[unit])

    # Several programs of one SM even out what is left at the end; a single one leaves SMs idle in
    # the last wave.
    waves: float = tiles / gpu.processors.value
    if per_sm == 1:
        waves = math.ceil(waves)
    visible = 1.0
    if per_sm > 1:
        visible = VISIBLE_SHARED_SM
    elif variant.persistent:
        visible = VISIBLE_PERSISTENT
    us = waves * (cycles[bound] + visible * gpu.ends_cycles.value) / gpu.clock_ghz.value / 1e3

    floor = floor_us(product, experts, gpu)
    if floor > us:
        us = floor
        bound = "HBM"
    # The base's alone: adapters are a cost, so their FLOPs do not raise the rate.
    flops = 2 * experts * product.rows_per_expert * product.N * product.K
    return Cost(us, bound, flops / us / 1e6)


# ---- the shapes ----------------------------------------------------------------------------------

POINTS = (
    (128, 64),
    (128, 128),
    (128, 256),
    (128, 512),
    (128, 1024),
    (16, 2048),
    (16, 4096),
    (16, 8192),
)
"""Experts of a rank and rows for each: all 128 on one GPU, or the 16 of one of 8 ranks."""
HIDDEN_INNER = {"30b": (2048, 768), "235b": (4096, 1536)}
"""Hidden size and expert intermediate size of Qwen3-30B-A3B and Qwen3-235B-A22B."""


def products(model: str, experts: int, rows: float, rank: int) -> dict[str, Product]:
    """The four products of a layer. All 128 experts gather tokens as they read; a share gets its
    rows in order.

    Args:
        model: a key of ``HIDDEN_INNER``.
        experts: of this rank.
        rows: for each of them.
        rank: of each projection; gate and up are stacked.
    """
    H, inner = HIDDEN_INNER[model]
    gathered = experts == 128

    def product(
        op: Literal["forward", "dgrad"], N: int, K: int, R: int, gathers: bool, blocks: int = 1
    ) -> Product:
        return Product(op, torch.bfloat16, N, K, R, gathers, rows, blocks)

    # Gate and up are one product with two blocks of outputs; in the gradient of their input they
    # are one sum over 2 I terms.
    return {
        "gate_up forward": product("forward", 2 * inner, H, 2 * rank, gathered, 2),
        "down forward": product("forward", H, inner, rank, False),
        "down dgrad": product("dgrad", inner, H, rank, gathered),
        "gate_up dgrad": product("dgrad", H, 2 * inner, 2 * rank, False),
    }


def last_release(product: Product) -> Variant:
    """The rule before variants: 64 rows below 384 for each expert, else 128."""
    if product.rows_per_expert < 384:
        return Variant(64, 128, 64, 4, 4)
    return Variant(128, 128, 64, 8, 4)


def best(product: Product, experts: int, gpu: Gpu = H100) -> Variant:
    """The fastest of the candidates by this model; the first of equals, so the rule's where nothing
    beats it."""
    fitting = [variant for variant in candidates(product) if programs_per_sm(variant, product)]
    # Rounded to a picosecond, so that equal times are equal whatever order their terms had.
    return min(fitting, key=lambda variant: round(cost(variant, product, experts, gpu).us, 6))


@dataclass(frozen=True)
class Published:
    """A time that others measured on an H100, of a kernel like ours."""

    what: str
    product: Product
    experts: int
    variant: Variant
    us: float


_WIDE = Variant(128, 256, 64, 8, 4, "tma", "tma")
PUBLISHED = (
    Published(
        "SGLang PR 36543, up",
        Product("forward", torch.bfloat16, 1536, 2048, 0, False, 315),
        128,
        _WIDE,
        531.0,
    ),
    Published(
        "SGLang PR 36543, down",
        Product("forward", torch.bfloat16, 2048, 768, 0, False, 315),
        128,
        _WIDE,
        283.0,
    ),
)
"""Qwen3-30B-A3B's very shapes in Triton 3.7.1."""
TOLERANCE = 0.05
"""How far the model may be from them."""


@dataclass(frozen=True)
class Line:
    """Predictions for one product of one point."""

    experts: int
    rows: int
    name: str
    floor_us: float
    before: Cost
    """By the last release's rule."""
    now: Cost
    """By ``variants.rule``."""
    best: Cost
    rule: Variant
    best_variant: Variant


def lines(model: str, rank: int, gpu: Gpu) -> list[Line]:
    """Every product at every point."""
    found: list[Line] = []
    for experts, rows in POINTS:
        for name, product in products(model, experts, rows, rank).items():
            chosen = rule(product)
            fastest = best(product, experts, gpu)
            line = Line(
                experts,
                rows,
                name,
                floor_us=floor_us(product, experts, gpu),
                before=cost(last_release(product), product, experts, gpu),
                now=cost(chosen, product, experts, gpu),
                best=cost(fastest, product, experts, gpu),
                rule=chosen,
                best_variant=fastest,
            )
            found.append(line)
    return found


HEADER = (
    "product",
    "floor us",
    "before us",
    "rule us",
    "best us",
    "TFLOP/s",
    "bound before",
    "bound",
    "best variant",
)


def show(found: list[Line]) -> str:
    """The table of predictions, one row for each product."""
    rows = []
    for line in found:
        best_variant = variant_label(line.best_variant)
        if line.best_variant == line.rule:
            best_variant = "the rule's"
        cells = (
            f"E{line.experts} x {line.rows} {line.name}",
            f"{line.floor_us:.0f}",
            f"{line.before.us:.0f}",
            f"{line.now.us:.0f}",
            f"{line.best.us:.0f}",
            f"{line.best.tflops:.0f}",
            line.before.bound,
            line.best.bound,
            best_variant,
        )
        rows.append(cells)
    return table(HEADER, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--model", choices=HIDDEN_INNER, default="30b")
    parser.add_argument(
        "--rank", type=int, default=0, help="rank of each projection's adapter; 0: the base alone"
    )
    parser.add_argument("--l2-tb-per-s", type=float, help="L2 bandwidth instead of the assumed one")
    args = parser.parse_args()
    if args.rank < 0:
        parser.error(f"--rank {args.rank}: a rank is 0 (no adapter) or more")
    gpu = GPUS[args.gpu]
    if args.l2_tb_per_s is not None:
        if args.l2_tb_per_s <= 0:
            parser.error(f"--l2-tb-per-s {args.l2_tb_per_s}: a bandwidth must be more than 0")
        gpu = replace(
            gpu, l2_tb_per_s=Constant(args.l2_tb_per_s, "TB/s", "measured", "the command line")
        )
    print(f"{args.model}, {gpu.name}, rank {args.rank}, bfloat16: predicted, not measured")
    print(show(lines(args.model, args.rank, gpu)))
    for case in PUBLISHED:
        predicted = cost(case.variant, case.product, case.experts, gpu)
        print(
            f"{case.what}: published {case.us:.0f} us on an H100, the model says {predicted.us:.0f}"
        )


if __name__ == "__main__":
    main()
