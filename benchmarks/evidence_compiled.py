"""Write evidence's table of compiled kernels: what each way to compute the grouped GEMM takes of a
multiprocessor."""

import json
from collections.abc import Iterable
from typing import Any

from benchmarks.evidence_records import Results, markdown


def compiled(results: Results) -> str:
    """The resources that each way to compute the grouped GEMM takes, over all products and ranks
    that it was compiled for."""
    found = compiled_ways(results)
    if not found:
        return "Not yet recorded (`python -m tests.kernels.compile_for_gpu --every` prints it)."
    # Ways of one version alone are in the table too, with "-" for the others.
    versions = sorted({version for rows in found.values() for version in rows})
    rows = []
    for way, by_version in found.items():
        cells = [" ".join(way)]
        for version in versions:
            compilations = by_version.get(version, [])
            ranges = []
            # In the order that the line above the table gives.
            for name in ("registers", "spilled", "shared", "per_sm", "loop"):
                ranges.append(_range(row[name] for row in compilations))
            cells.append(" / ".join(ranges))
        rows.append(cells)
    header = ("variant", *(f"Triton {version}" for version in versions))
    return "Registers / spilled bytes / shared memory / programs per SM / loop.\n\n" + markdown(
        header, rows
    )


def _range(values: Iterable[int]) -> str:
    """The least and the most of several values, or their only one."""
    known = sorted(set(values))
    if not known:
        return "-"
    return f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"


def compiled_ways(results: Results) -> dict[tuple[str, ...], dict[str, list[dict[str, Any]]]]:
    """Compilations by way (variant, warps and stages, how operands are loaded) and by version of
    Triton."""
    found: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(results.folder.glob("compiled_*.json")):
        for row in json.loads(path.read_text()):
            # Left out are other kernels than the GEMM, what the compiler rejected, and other GPUs:
            # the page is about sm_90.
            if "product" not in row or row["refused"] or "error" in row or row["capability"] != 90:
                continue
            operands = f"w {row['weight']}, x {row['rows']}"
            if row["persistent"]:
                operands += ", persistent"
            way = (row["variant"], f"w{row['num_warps']} s{row['num_stages']}", operands)
            found.setdefault(way, {}).setdefault(row["triton"], []).append(row)
    return found
