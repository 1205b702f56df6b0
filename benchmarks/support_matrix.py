"""Print the table of support as Markdown: families by parallelisms, PEFT and vLLM.

    python -m benchmarks.support_matrix

Rows are the registered families. Marks come from benchmarks/results: from support.json, which
``benchmarks/support.py`` writes, parity.json of ``benchmarks/parity.py``, and gpu_shared.json of
``benchmarks/shared_gpu.py``. No list here says what is supported: a family that has no result, or
of which a case failed, is marked as not proved.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape

RESULTS = Path(__file__).parent / "results"
CPU = "CPU"
GPU = "GPU"
NOT_PROVED = "-"
NO_EXPERTS = "n/a"
LEGEND = (
    f"{CPU}: proved on CPU. {GPU}: also run by ranks that share one H100. {NOT_PROVED}: not proved."
    f" {NO_EXPERTS}: without experts."
)
COLUMNS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "train": lambda row: row["claim"] == "layout",
    "TP": lambda row: row.get("tp", 1) > 1,
    "PP": lambda row: row.get("pp", 1) > 1,
    "VPP": lambda row: row.get("vpp", 1) > 1,
    "EP": lambda row: row.get("ep", 1) > 1,
    "ETP": lambda row: row.get("etp", 1) > 1,
    "CP": lambda row: row.get("cp", 1) > 1,
    # Rows of so many tokens, however many samples that is: the grid's microbatch of 0.
    "packed": lambda row: row.get("micro", 1) == 0,
    "recompute": lambda row: row.get("recompute", "off") != "off",
    "PEFT": lambda row: row["claim"] == "peft",
    "vLLM": lambda row: row["claim"] == "vllm",
}
"""Column to the test whether a row of the results is about it."""


def mark(column: str, records: Iterable[dict[str, Any]]) -> str:
    """The mark of one family in one column: proved where some case is about it and all such cases
    held on CPU ranks; run on a GPU where one such case held there too."""
    held: dict[bool, list[bool]] = {False: [], True: []}
    for record in records:
        for row in record["rows"]:
            if COLUMNS[column](row):
                held[record["on_gpu"]].append(row["ok"])
    # A GPU runs few of the cases, so alone it proves nothing.
    if not held[False] or not all(held[False]):
        return NOT_PROVED
    return GPU if any(held[True]) else CPU


def has_experts(family: str) -> bool:
    return bool(model_shape({**FAMILIES[family].tiny, "model_type": family}).moe_layers)


def table(records: list[dict[str, Any]]) -> str:
    """The table and its legend."""
    lines = [
        f"| family (`model_type`) | {' | '.join(COLUMNS)} |",
        f"|---|{':-:|' * len(COLUMNS)}",
    ]
    for name, family in FAMILIES.items():
        # A record from CPU ranks, and for one family another from a GPU.
        own = [record for record in records if record["family"] == name]
        marks = {column: mark(column, own) for column in COLUMNS}
        # Without experts there is nothing for these two to divide.
        if not has_experts(name):
            marks |= {"EP": NO_EXPERTS, "ETP": NO_EXPERTS}
        lines.append(f"| {family.title} (`{name}`) | {' | '.join(marks.values())} |")
    return "\n".join([*lines, "", LEGEND])


def read_results() -> list[dict[str, Any]]:
    """What was proved of each family on CPU ranks, and of Qwen3-MoE by ranks that share a GPU."""
    path = RESULTS / "support.json"
    found = json.loads(path.read_text()) if path.exists() else []
    path = RESULTS / "parity.json"
    if path.exists():
        found += of_parity(json.loads(path.read_text()))
    path = RESULTS / "gpu_shared.json"
    if path.exists():
        found.append(of_shared(json.loads(path.read_text())))
    return found


def of_parity(parity: dict[str, Any]) -> list[dict[str, Any]]:
    """A record of ``parity.py`` in the form of those of ``support.py``, one for each family."""
    of_family: dict[str, list[dict[str, Any]]] = {}
    for row in parity["rows"]:
        # Cases in bfloat16 are compared with plain transformers' own rounding: no proof of a
        # layout.
        if "plain" not in row:
            held = not (row["failed"] or row["exceeded"])
            rows = of_family.setdefault(row["family"], [])
            rows.append({"claim": "layout", "ok": held, **row})
    found = []
    for family, rows in of_family.items():
        record = {"family": family, "on_gpu": False, "rows": rows}
        for key in ("device", "commit", "versions"):
            record[key] = parity[key]
        found.append(record)
    return found


def of_shared(shared: dict[str, Any]) -> dict[str, Any]:
    """A record of ``shared_gpu.py`` in the form of those of ``support.py``.

    A case is named as the parity grid names it: "4:tp2-ep2 moe, all, off, 1" has 4 ranks, a layout,
    the model (a tiny Qwen3-MoE), the adapter, recomputation and samples of a microbatch.
    """
    rows = []
    for row in shared["rows"]:
        layout, _, recompute, _ = row["case"].split(", ")
        held = not (row["failed"] or row["exceeded"])
        found = {"claim": "layout", "ok": held, "recompute": recompute}
        # "tp2" and "ep2" out of "4:tp2-ep2 moe".
        for axis, size in re.findall(r"([a-z]+)(\d+)", layout):
            found[axis] = int(size)
        rows.append(found)
    return {
        "family": "qwen3_moe",
        # A dry run of that script has the form of a run on a GPU.
        "on_gpu": not shared["device"].startswith("CPU"),
        "device": shared["device"],
        "commit": shared["commit"],
        "versions": shared["versions"],
        "rows": rows,
    }


if __name__ == "__main__":
    print(table(read_results()))
