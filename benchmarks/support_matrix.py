"""Print the table of support as Markdown: families by parallelisms, PEFT and vLLM.

    python -m benchmarks.support_matrix

Rows are the registered families, marks come from benchmarks/results/support.json, which
``benchmarks/support.py`` writes: nothing here says what is supported. A family that has no result,
or of which a case failed, is marked as not proved.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape

RESULTS = Path(__file__).parent / "results" / "support.json"
CPU = "CPU"
GPU = "GPU"
NOT_PROVED = "-"
NO_EXPERTS = "n/a"
LEGEND = (
    f"{CPU}: proved on CPU. {GPU}: run on GPU. {NOT_PROVED}: not proved. {NO_EXPERTS}: a model"
    " without experts."
)
COLUMNS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "train": lambda row: row["claim"] == "layout",
    "TP": lambda row: row.get("tp", 1) > 1,
    "PP": lambda row: row.get("pp", 1) > 1,
    "VPP": lambda row: row.get("vpp", 1) > 1,
    "EP": lambda row: row.get("ep", 1) > 1,
    "ETP": lambda row: row.get("etp", 1) > 1,
    "recompute": lambda row: row.get("recompute", "off") != "off",
    "PEFT": lambda row: row["claim"] == "peft",
    "vLLM": lambda row: row["claim"] == "vllm",
}
"""Column -> whether a row of the results is about it."""


def mark(column: str, records: Iterable[dict[str, Any]]) -> str:
    """The mark of one family in one column: proved where some case is about it and all such cases
    held, on the GPU where one of them ran there."""
    about = [(r["on_gpu"], row["ok"]) for r in records for row in r["rows"] if COLUMNS[column](row)]
    if not about or not all(ok for _, ok in about):
        return NOT_PROVED
    return GPU if any(on_gpu for on_gpu, _ in about) else CPU


def has_experts(family: str) -> bool:
    return bool(model_shape({**FAMILIES[family].tiny, "model_type": family}).moe_layers)


def table(records: list[dict[str, Any]]) -> str:
    """The table and its legend."""
    lines = [
        f"| family (`model_type`) | {' | '.join(COLUMNS)} |",
        f"|---|{':-:|' * len(COLUMNS)}",
    ]
    for name, family in FAMILIES.items():
        own = [record for record in records if record["family"] == name]
        marks = {column: mark(column, own) for column in COLUMNS}
        if not has_experts(name):
            marks |= {"EP": NO_EXPERTS, "ETP": NO_EXPERTS}
        lines.append(f"| {family.title} (`{name}`) | {' | '.join(marks.values())} |")
    return "\n".join([*lines, "", LEGEND])


def read_results() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


if __name__ == "__main__":
    print(table(read_results()))
