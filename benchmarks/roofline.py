"""Predict what experts with LoRA cost on a GPU over the base alone, by bytes and FLOPs of each
pass.

    python -m benchmarks.roofline [--ep 8] [--tokens 8192] [--rank 16] [--model 30b]

This is a prediction, to be compared with what ``bench_grouped_lora.py`` measures. Our Triton GEMM
takes the time that ``tile_model.py`` gives for the variant that ``variants.rule`` chooses.
CUTLASS's takes the longer of its traffic and its arithmetic at 640 TFLOP/s, which Transformer
Engine's reaches at these shapes on an H100 (published). Every other pass takes the time of its
traffic at 3.0 TB/s.
"""

import argparse
from dataclasses import dataclass

import torch
from megalora_kernels.variants import Product, rule

from benchmarks.tile_gpus import H100
from benchmarks.tile_model import HIDDEN_INNER, SIZE, cost, floor_us

CUTLASS_TFLOPS = 640.0
TOP_K = 8
"""Experts of a token."""


@dataclass(frozen=True)
class Case:
    """Sizes of a layer on one rank: H hidden, I intermediate, M routed rows, T rows of x, E experts
    of this rank, r rank of each adapter."""

    H: int
    I: int
    M: int
    T: int
    E: int
    r: int
    on_gate_up: int = 2
    """Adapters on gate_up: gate and up have one each, as megalora trains, or share one (1), as PEFT
    and Bridge have it."""


def gemm_us(case: Case, outputs: int, inputs: int, rank: int, backend: str) -> float:
    """Microseconds of one grouped GEMM ``[M, inputs] x [E, inputs, outputs]`` with an adapter."""
    product = Product("forward", torch.bfloat16, outputs, inputs, rank, False, case.M / case.E)
    if backend == "triton":
        return cost(rule(product), product, case.E).us
    # Adapters are K columns more of the same GEMM: rank columns [s] times [B].
    flops = 2 * case.M * outputs * (inputs + rank)
    return max(flops / (CUTLASS_TFLOPS * 1e6), floor_us(product, case.E))


def traffic_us(case: Case, per_row: float, per_expert: float = 0.0) -> float:
    """Microseconds of a pass that moves so many elements for each row and for each expert."""
    return SIZE * (case.M * per_row + case.E * per_expert) / (H100.hbm_tb_per_s.value * 1e6)


def forward(case: Case, backend: str, rank: int) -> dict[str, float]:
    """Microseconds of each pass of our node, rows gathered from T tokens; ``rank`` 0: the base."""
    H = case.H
    I = case.I
    R = case.on_gate_up * rank
    # Share of a token that each of its rows reads from HBM: after the first it comes from cache.
    token = case.T / case.M
    # Triton gathers as it reads; torch's GEMM wants rows in order.
    copies = H if backend == "grouped_mm" else 0
    # With neither a copy nor an adapter there is no such pass.
    permute_us = 0.0
    if copies or rank:
        permute_us = traffic_us(case, token * H + copies + R, R * H)
    passes = {
        "permute + shrink": permute_us,
        "gate_up": gemm_us(case, 2 * I, H, R, backend),
        "SwiGLU + shrink": traffic_us(case, 3 * I + rank, rank * I),
        "down": gemm_us(case, H, I, rank, backend),
        "combine": traffic_us(case, H + token * H),
    }
    # Every step B is written beside the weights, [W | B]: read once and written once.
    if rank and backend == "grouped_mm":
        passes["B into the weights"] = traffic_us(case, 0, 2 * (2 * I * R + H * rank))
    return passes


def backward(case: Case, backend: str, rank: int) -> dict[str, float]:
    """The same for backward: gradients of both linears' inputs and of the adapters."""
    H = case.H
    I = case.I
    R = case.on_gate_up * rank
    token = case.T / case.M
    copies = H if backend == "grouped_mm" else 0
    unpermute_us = 0.0
    if copies or rank:
        unpermute_us = traffic_us(case, token * H + copies + rank, rank * H)
    # SwiGLU's backward reads dh and y and writes dy (1 + 2 + 2 widths), and with adapters S and dS.
    with_adapters = R + rank if rank else 0
    passes = {
        "unpermute + shrink": unpermute_us,
        "down dgrad": gemm_us(case, I, H, rank, backend),
        "SwiGLU backward": traffic_us(case, 5 * I + with_adapters),
        "gate_up dgrad": gemm_us(case, H, 2 * I, R, backend),
        "combine": traffic_us(case, H + token * H),
    }
    if rank:
        passes["dS of gate_up"] = traffic_us(case, 2 * I + R, 2 * I * R)
        passes["dA of gate_up"] = traffic_us(case, token * H + R, R * H * 3)
        passes["dB of down"] = traffic_us(case, token * H + rank, rank * H * 3)
        if backend == "grouped_mm":
            passes["A into the weights"] = traffic_us(case, 0, 2 * (H * R + I * rank))
    return passes


def split(case: Case) -> tuple[float, float]:
    """Microseconds of forward and of backward with separate grouped GEMMs and element-wise
    operations, by autograd."""
    H = case.H
    I = case.I
    r = case.r
    forward_us = 0.0
    backward_us = 0.0
    for inputs, outputs, rank in ((H, 2 * I, case.on_gate_up * r), (I, H, r)):
        # x W^T; s = x A^T; s B^T
        forward_us += gemm_us(case, outputs, inputs, 0, "split")
        forward_us += gemm_us(case, rank, inputs, 0, "split")
        forward_us += gemm_us(case, outputs, rank, 0, "split")
        # The scale reads and writes the outputs, the add reads both and writes one: 2 + 3.
        forward_us += traffic_us(case, 5 * outputs)
        # dx = dy W; ds = dy B; ds A
        backward_us += gemm_us(case, inputs, outputs, 0, "split")
        backward_us += gemm_us(case, rank, outputs, 0, "split")
        backward_us += gemm_us(case, inputs, rank, 0, "split")
        # The add of both parts of dx, and the scale of dy.
        backward_us += traffic_us(case, 3 * inputs + 2 * outputs)
        # dA reads x and ds, dB reads dy and s.
        backward_us += traffic_us(case, inputs + outputs + 2 * rank)
    # Gather, SwiGLU (its operations one by one) and combine.
    forward_us += traffic_us(case, 2 * H) + traffic_us(case, 8 * I) + traffic_us(case, 2 * H)
    backward_us += traffic_us(case, 2 * H) + traffic_us(case, 12 * I) + traffic_us(case, 2 * H)
    return forward_us, backward_us


@dataclass(frozen=True)
class Ratios:
    """Times of our node with adapters over those of the same node without, by one back end."""

    forward: float
    both: float
    """Ratio of forward and backward together."""
    split_over_ours: float
    """How many times as long forward and backward take with separate grouped GEMMs."""


def layer(model: str, tokens: int, ep: int, rank: int, on_gate_up: int = 2) -> Case:
    """The case of one rank. Under expert parallelism x has a row for each that was received, else
    one for each token, which is gathered k times."""
    rows = tokens * TOP_K
    return Case(
        *HIDDEN_INNER[model], rows, tokens if ep == 1 else rows, 128 // ep, rank, on_gate_up
    )


def ratios(case: Case, backend: str) -> Ratios:
    """What adapters cost by one back end."""
    base_forward = sum(forward(case, backend, 0).values())
    base_both = base_forward + sum(backward(case, backend, 0).values())
    ours_forward = sum(forward(case, backend, case.r).values())
    ours_both = ours_forward + sum(backward(case, backend, case.r).values())
    return Ratios(
        forward=ours_forward / base_forward,
        both=ours_both / base_both,
        split_over_ours=sum(split(case)) / ours_both,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ep", type=int, default=8, help="expert-parallel ranks that share 128 experts"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of this rank")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--model", choices=HIDDEN_INNER, default="30b")
    args = parser.parse_args()
    case = layer(args.model, args.tokens, args.ep, args.rank)
    print(f"{case}, bfloat16, H100: microseconds, base | with LoRA")
    for backend in ("grouped_mm", "triton"):
        sums = []
        for name, phase in (("forward", forward), ("backward", backward)):
            base = phase(case, backend, 0)
            ours = phase(case, backend, case.r)
            sums.append((sum(base.values()), sum(ours.values())))
            print(f"\n{backend}, {name}")
            for step, us in ours.items():
                print(f"  {step:22} {base.get(step, 0.0):8.1f} | {us:8.1f}")
            print(
                f"  {'sum':22} {sums[-1][0]:8.1f} | {sums[-1][1]:8.1f}   ratio"
                f" {sums[-1][1] / sums[-1][0]:.3f}"
            )
        found = ratios(case, backend)
        base_us = sum(base for base, _ in sums)
        apart = (
            f"split grouped GEMMs {sum(split(case)) / base_us:.2f} ({found.split_over_ours:.2f}"
            " times ours)"
        )
        print(f"  forward + backward: {found.both:.3f} of the base; {apart}")


if __name__ == "__main__":
    main()
