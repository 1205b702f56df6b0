"""Time one grouped linear whose frozen weight is held as codes: decoded in the loads of the GEMM,
decoded into memory first, and the same weight plain.

    python -m benchmarks.bench_coded_gemm --budget-seconds 60 --out coded.json

Only an arm that agrees with float32 within 1 % (bfloat16 rounding gives 0.6 %), with the same bits
twice, has a time; the exit code is 1 where one does not. ``--dry`` tries the path at tiny sizes on
a CPU with interpreted kernels: its times mean nothing. Decoding first is done by torch, as the
package does it.

Shape legend: M routed rows   E experts   K inputs   N outputs
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megalora_kernels import QuantisedWeight, Routing
from megalora_kernels.backend import INTERPRETED
from megalora_kernels.coded_gemm import coded_gemm_triton
from megalora_kernels.gemm_kernel import grouped_gemm_triton
from torch import Tensor

from benchmarks.gpu_timing import Budget, earlier, first_line, measure, number, save, table, the_gpu

ALLOWED = 0.01
LEAST_SECONDS = 5
"""Seconds without which no case is begun."""
GRAINS = {"nf4": (1, 64), "fp8": (128, 128)}


@dataclass(frozen=True)
class Case:
    """Sizes of gate_up of Qwen3-30B-A3B, or tiny ones."""

    form: Literal["nf4", "fp8"]
    rows: int
    """Of each expert."""
    experts: int = 128
    outputs: int = 1536
    inputs: int = 2048

    @property
    def name(self) -> str:
        sizes = f"{self.experts} x {self.outputs} x {self.inputs}"
        return f"{self.form}, {sizes}, {self.rows} rows per expert"


CASES = [Case(form, rows) for rows in (64, 16, 256, 512) for form in ("nf4", "fp8")]
DRY = [Case("nf4", 5, 2, 128, 128), Case("fp8", 5, 2, 128, 128)]


def weight_of(case: Case, device: torch.device) -> QuantisedWeight:
    """Random codes, with scales that give values of order K^-1/2."""
    g = torch.Generator(device).manual_seed(0)
    p, q = GRAINS[case.form]
    width = case.inputs // 2 if case.form == "nf4" else case.inputs
    shape = (case.experts, case.outputs, width)
    codes = torch.randint(0, 256, shape, generator=g, device=device, dtype=torch.uint8)
    largest = 1.0
    if case.form == "fp8":
        codes[(codes & 127) == 127] = 0  # NaN
        largest = 448.0
    grid = (case.experts, case.outputs // p, case.inputs // q)
    scales = torch.rand(grid, generator=g, device=device) + 0.5
    return QuantisedWeight(case.form, codes, scales * (case.inputs**-0.5 / largest), (p, q))


def arms_of(
    x_MK: Tensor, weight: QuantisedWeight, routing: Routing
) -> dict[str, Callable[[], Tensor]]:
    """The three ways; what they need is made before they are timed."""
    plain_ENK = weight.dequantised(x_MK.dtype)
    scratch_ENK = torch.empty_like(plain_ENK)

    def first() -> Tensor:
        weight.decode_into(scratch_ENK)
        return grouped_gemm_triton(x_MK, scratch_ENK.transpose(1, 2), routing)

    return {
        "plain": lambda: grouped_gemm_triton(x_MK, plain_ENK.transpose(1, 2), routing),
        "first": first,
        "in load": lambda: coded_gemm_triton(x_MK, weight, routing),
    }


def problem_of(call: Callable[[], Tensor], want_MN: Tensor) -> str:
    """``ok``, or why an arm gets no time."""
    try:
        y_MN = call()
        again_MN = call()
    except Exception as error:
        # Whatever a driver or a compiler raises belongs in the table; the next arm goes on.
        return first_line(error)
    error = float((y_MN.float() - want_MN).norm() / want_MN.norm())
    # Not "error > ALLOWED": NaN is wrong, too.
    if not error <= ALLOWED:
        return f"differs from float32 by {error:.2g}, allowed {ALLOWED}"
    if not torch.equal(y_MN, again_MN):
        return "other bits on the second call"
    return "ok"


def examine(case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> list[Any]:
    """A row for each arm; times of those alone that are right."""
    weight = weight_of(case, device)
    M = case.experts * case.rows
    ends_E = torch.arange(1, case.experts + 1, device=device, dtype=torch.int32) * case.rows
    g = torch.Generator(device).manual_seed(1)
    x_MK = torch.randn(M, case.inputs, generator=g, device=device, dtype=dtype)
    want = []
    for e, rows in enumerate(x_MK.split(case.rows)):
        w_NK = weight.experts(e, e + 1).dequantised(torch.float32)[0]
        want.append(rows.float() @ w_NK.t())
    want_MN = torch.cat(want)
    arms = arms_of(x_MK, weight, Routing(ends_E, M))
    found = {name: problem_of(call, want_MN) for name, call in arms.items()}
    right = {name: call for name, call in arms.items() if found[name] == "ok"}
    stats = measure(right, device, repeats, min(3, repeats))
    plain = stats.get("plain")
    rows = []
    for name, status in found.items():
        us = over = None
        if name in stats:
            us = 1e3 * stats[name].median_ms
            over = None if plain is None else stats[name].median_ms / plain.median_ms
        rows.append(
            {"case": case.name, "arm": name, "status": status, "us": us, "over_plain": over}
        )
    return rows


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Measure every case that time allows; return the exit code."""
    budget = Budget(args.budget_seconds)
    settings = {"dry": args.dry}
    before = earlier(args.out, "coded", device, settings)
    rows: list[Any] = [] if before is None else before["rows"]
    known = {row["case"] for row in rows if row["status"] == "ok"}
    rows = [row for row in rows if row["case"] in known]
    not_reached: list[str] = []
    for case in DRY if args.dry else CASES:
        if case.name in known:
            continue
        if budget.left() < LEAST_SECONDS:
            not_reached.append(case.name)
            continue
        dtype = torch.float32 if args.dry else torch.bfloat16
        rows += examine(case, device, dtype, 1 if args.dry else 20)
        save(args.out, "coded", device, settings=settings, rows=rows, not_reached=not_reached)
    # Once more, for what was not reached.
    save(args.out, "coded", device, settings=settings, rows=rows, not_reached=not_reached)
    cells = []
    for row in rows:
        times = (number(row["us"], 0), number(row["over_plain"], 2))
        cells.append((f"{row['case']}: {row['arm']}", *times, row["status"]))
    print(table(("case and arm", "us", "over plain", "status"), cells))
    for name in not_reached:
        print(f"out of time before: {name}")
    return 1 if any(row["status"] != "ok" for row in rows) else 0


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench_coded_gemm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget-seconds", type=float, help="begin no case beyond this time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_coded.json"))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, interpreted")
    args = parser.parse_args(given)
    if args.dry and not INTERPRETED:
        parser.error("--dry runs kernels on a CPU: set TRITON_INTERPRET=1")
    device = the_gpu(parser, args.dry)
    # The reference is float32; TF32 would round its inputs to 10 bits.
    torch.set_float32_matmul_precision("highest")
    try:
        return run(args, device)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
