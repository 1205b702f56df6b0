"""Compile every Triton kernel for GPUs that are not there, and print what each needs.

    python -m tests.kernels.compile_for_gpu [--capability 80 89 90 100] [--every] [--table]

Triton carries its own assembler, so types, shapes, shared memory, registers and spills are known
before a GPU is. The launchers run on CPU tensors with a driver that names a target and with
launches cut off behind the compiler. Every case is compiled in a forked process of its own, two at
a time: a compiler that ends its process is a result like any other.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from megalora_kernels import backend, coded_gemm, gemm_kernel, tuned
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.tune_compile import NamedTarget
from tests.forked import forked
from tests.kernels import compile_cases, compile_coded, sass
from tests.kernels.compile_cases import Case

AT_ONCE = 2


def compile_all(cases: list[Case]) -> list[dict[str, Any]]:
    """Return a row for each kernel of each case, or one with ``error``: what was raised, or how the
    process ended."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # Kernels that several cases share are compiled once, and nothing that an earlier run left
        # behind is taken.
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/cache"
        jobs = []
        for i, case in enumerate(cases):
            jobs.append((i, compile_case, (case, Path(folder) / str(i))))
        for i, _, code in forked(jobs, AT_ONCE):
            rows += result_of(cases[i], Path(folder) / str(i), code)
    # Processes end in any order; a table is read in that of the cases.
    order = {case.label: i for i, case in enumerate(cases)}
    return sorted(rows, key=lambda row: (row["capability"], order[row["case"]]))


def result_of(case: Case, path: Path, code: int) -> list[dict[str, Any]]:
    known = {
        "case": case.label,
        "capability": case.capability,
        "triton": triton.__version__,
        **case.facts,
    }
    result = path.with_suffix(".json")
    if result.is_file():
        rows = json.loads(result.read_text())
        return [{**known, **row} for row in rows]
    # No result: the last line that looks like an error, or else the last line, says why.
    said = path.with_suffix(".txt").read_text(errors="replace").strip().splitlines() or [""]
    telling = said[-1]
    for line in said:
        if "Assertion" in line or "error" in line.lower():
            telling = line
    # Python gives a process that a signal ended the signal's number, negative.
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return [{**known, "error": f"{ended}: {telling[:300]}"}]


def compile_case(case: Case, path: Path) -> None:
    """In a process of its own: run the launchers up to the compiler, and write what it made."""
    with path.with_suffix(".txt").open("w") as output:
        os.dup2(output.fileno(), 2)  # the compiler's own messages, too
    rows: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        # Triton's own name for compiling without a launch.
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        row: dict[str, Any] = {"kernel": self.__name__, "dtype": None}
        # The first tensor's dtype is that of the activations; indexes come later.
        for t in args:
            if hasattr(t, "dtype"):
                row["dtype"] = str(t.dtype).removeprefix("torch.")
                break
        # A kernel has some of these block sizes; the others stay None.
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_I", "BLOCK_K", "num_stages"):
            row[name] = kwargs.get(name)
        row |= sass.describe(kernel, case.capability)
        rows.append(row)
        return kernel

    driver.set_active(NamedTarget(case.capability))  # pyright: ignore
    JITFunction.run = compile_only
    backend.INTERPRETED = True  # CPU tensors are all there is
    # Each of these imported the function by name; they ask it how much shared memory there is.
    for module in (gemm_kernel, coded_gemm, tuned, sys.modules["megalora_kernels.swiglu_backward"]):
        module.device_limits = lambda _device: compile_cases.limits_of(case.capability)
    case.call()
    path.with_suffix(".json").write_text(json.dumps(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: the variants of the grouped GEMM, and SwiGLU's passes."""
    lines = [
        (
            "| product | tile | warps, stages | operands | rank | registers | shared | per SM |"
            " loop | copies in the loop |"
        ),
        "|---|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        # Only variants that are offered; kernels of whole layers have no product to name.
        if row.get("refused") or "product" not in row or "error" in row:
            continue
        ways = {"pointers": "pointers", "tma": "TMA"}
        operands = f"w {ways[row['weight']]}, x {ways[row['rows']]}"
        operands += ", persistent" if row["persistent"] else ""
        copies = f"{row['tma']} TMA + {row['cp_async']} cp.async"
        lines.append(
            f"| {row['product']} | {row['variant']} | w{row['num_warps']} s{row['num_stages']} |"
            f" {operands} | {row['rank']} | {row['registers']} | {row['shared']:,} |"
            f" {row['per_sm']} | {row['loop']} | {copies} |"
        )
    lines += [
        "",
        "| pass | ranks | tile | registers | shared | per SM | instructions per element |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "ranks" in row and row.get("activation_loop"):
            lines.append(
                f"| `{row['kernel']}` | {row['ranks'][0]}, {row['ranks'][1]} | {row['BLOCK_M']} x"
                f" {row['BLOCK_I']} | {row['registers']} | {row['shared']:,} | {row['per_sm']} |"
                f" {per_element(row):.1f} |"
            )
    return "\n".join(lines)


def per_element(row: dict[str, Any], what: str = "activation_loop") -> float:
    """Return instructions of the loop over elements per element of a pass of SwiGLU."""
    # A turn of the loop computes one tile; each thread has its share of it, 32 threads a warp.
    return row[what] / (row["BLOCK_M"] * row["BLOCK_I"] / (32 * row["warps"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile every Triton kernel for GPUs that are not there."
    )
    parser.add_argument(
        "--capability", type=int, nargs="+", choices=sorted(sass.CHIPS), default=[90]
    )
    parser.add_argument(
        "--every", action="store_true", help="all variants of the GEMM: minutes, not seconds"
    )
    parser.add_argument("--table", action="store_true", help="print Markdown instead of JSON")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("compile_for_gpu: TRITON_INTERPRET=1 keeps kernels from being compiled; unset it")
    cases = []
    for capability in options.capability:
        for part in (compile_cases, compile_coded):
            cases += part.every(capability) if options.every else part.few(capability)
    rows = compile_all(cases)
    print(table(rows) if options.table else json.dumps(rows))


if __name__ == "__main__":
    main()
