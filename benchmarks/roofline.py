"""What the expert MLP with LoRA must cost on a GPU: bytes and FLOPs of every pass, as ratios to the base alone.

    python -m benchmarks.roofline [--ep 8] [--tokens 8192] [--rank 16] [--model 30b]

A prediction, to be set beside what ``bench_grouped_lora.py`` measures. A GEMM takes the longer of its arithmetic and its traffic;
every other pass is its traffic. Rates are those measured on an H100 (790 TFLOP/s dense, 3.0 TB/s); a grouped GEMM reaches
what its kind reaches at these shapes: 640 TFLOP/s for CUTLASS, 500 for Triton.
"""

import argparse
from dataclasses import dataclass

BYTES_PER_S = 3.0e12
TFLOPS = {"grouped_mm": 640.0, "triton": 500.0, "split": 640.0}
SHAPES = {"30b": (2048, 768), "235b": (4096, 1536)}
TOP_K, SIZE = 8, 2  # experts per token; bytes of bfloat16


@dataclass(frozen=True)
class Case:
    """H hidden, I intermediate, M routed rows, T rows of x, E experts of this rank, r rank of each projection."""

    H: int
    I: int  # noqa: E741
    M: int
    T: int
    E: int
    r: int


def gemm_us(case: Case, outputs: int, inputs: int, backend: str) -> float:
    """One grouped GEMM ``[M, inputs] x [E, inputs, outputs]`` in microseconds."""
    flops = 2 * case.M * outputs * inputs
    moved = SIZE * (case.M * (inputs + outputs) + case.E * inputs * outputs)
    return max(flops / (TFLOPS[backend] * 1e6), moved / BYTES_PER_S * 1e6)


def traffic_us(case: Case, per_row: float, per_expert: float = 0.0) -> float:
    """A pass that moves so many elements per row and per expert."""
    return SIZE * (case.M * per_row + case.E * per_expert) / BYTES_PER_S * 1e6


def forward(case: Case, backend: str, rank: int) -> dict[str, float]:
    """Microseconds of each pass of our node, ``rank`` 0: the base alone. Rows are gathered from T tokens."""
    H, I, R = case.H, case.I, 2 * rank  # noqa: E741
    token = case.T / case.M  # elements of a token counted per row: a gather reads it from cache after the first time
    copies = H if backend == "grouped_mm" else 0  # Triton gathers as it reads; torch's GEMM wants rows in order
    passes = {
        "permute + shrink": traffic_us(case, token * H + copies + R, R * H) if copies or rank else 0.0,
        "gate_up": gemm_us(case, 2 * I, H + R, backend),
        "SwiGLU + shrink": traffic_us(case, 3 * I + rank, rank * I),
        "down": gemm_us(case, H, I + rank, backend),
        "combine": traffic_us(case, H + token * H),
    }
    if rank and backend == "grouped_mm":
        passes["B into the weights"] = traffic_us(case, 0, 2 * (2 * I * R + H * rank))
    return passes


def backward(case: Case, backend: str, rank: int) -> dict[str, float]:
    """The same for backward: input gradients of both linears; weight gradients of the adapters only."""
    H, I, R = case.H, case.I, 2 * rank  # noqa: E741
    token = case.T / case.M
    copies = H if backend == "grouped_mm" else 0
    passes = {
        "unpermute + shrink": traffic_us(case, token * H + copies + rank, rank * H) if copies or rank else 0.0,
        "down dgrad": gemm_us(case, I, H + rank, backend),
        "SwiGLU backward": traffic_us(case, 5 * I + (R + rank if rank else 0)),
        "gate_up dgrad": gemm_us(case, H, 2 * I + R, backend),
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
    """(forward, backward) of separate grouped GEMMs and element-wise operations, as autograd composes them."""
    H, I, r = case.H, case.I, case.r  # noqa: E741
    total = [0.0, 0.0]
    for inputs, outputs, rank in ((H, 2 * I, 2 * r), (I, H, r)):
        total[0] += gemm_us(case, outputs, inputs, "split") + gemm_us(case, rank, inputs, "split")
        total[0] += gemm_us(case, outputs, rank, "split") + traffic_us(case, 5 * outputs)  # scale; add
        total[1] += gemm_us(case, inputs, outputs, "split") + gemm_us(case, rank, outputs, "split")  # dX, dS
        total[1] += gemm_us(case, inputs, rank, "split") + traffic_us(
            case, 3 * inputs + 2 * outputs
        )  # dS A; add; scale
        total[1] += traffic_us(case, inputs + outputs + 2 * rank)  # dA, dB
    total[0] += traffic_us(case, 2 * H) + traffic_us(case, 2 * I + 6 * I) + traffic_us(case, 2 * H)
    total[1] += traffic_us(case, 2 * H) + traffic_us(case, 12 * I) + traffic_us(case, 2 * H)
    return total[0], total[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=8, help="expert-parallel ranks that share 128 experts")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of this rank")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--model", choices=SHAPES, default="30b")
    args = parser.parse_args()
    rows = args.tokens * TOP_K
    # With expert parallelism x is the rows as they were received; without it, tokens that are gathered k times.
    case = Case(*SHAPES[args.model], rows, args.tokens if args.ep == 1 else rows, 128 // args.ep, args.rank)
    print(f"{case}, bfloat16, H100: microseconds, base | with LoRA")
    for backend in ("grouped_mm", "triton"):
        sums = []
        for name, phase in (("forward", forward), ("backward", backward)):
            base, ours = phase(case, backend, 0), phase(case, backend, case.r)
            sums.append((sum(base.values()), sum(ours.values())))
            print(f"\n{backend}, {name}")
            for step, us in ours.items():
                print(f"  {step:22} {base.get(step, 0.0):8.1f} | {us:8.1f}")
            print(f"  {'sum':22} {sums[-1][0]:8.1f} | {sums[-1][1]:8.1f}   ratio {sums[-1][1] / sums[-1][0]:.3f}")
        base_us, ours_us, apart = (sum(s[0] for s in sums), sum(s[1] for s in sums), sum(split(case)))
        print(
            f"  forward + backward: {ours_us / base_us:.3f} of the base; split grouped GEMMs {apart / base_us:.2f}",
            end="",
        )
        print(f" ({apart / ours_us:.2f} times ours)")


if __name__ == "__main__":
    main()
