"""Fill the sections of README.

Numbers come from benchmarks/results, the plan from the planner, the quickstart's output from its
record: what README claims is what these say.
"""

import contextlib
import io
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import support_matrix
from docs.scripts.sections import fill
from megalora.cli.main import main as megalora
from tests.mutations.every import EVERY_BUG

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
MAX_COLUMNS = 100
PLAN = (
    "plan", "configs/sft/template.yaml", "--gpus", "64", "--top", "3",
    "model.path=Qwen/Qwen3-235B-A22B",
)  # fmt: skip
"""Arguments of the command whose rows README shows."""
QUICKSTART_LINES = (
    "runs/quickstart/base (qwen3_moe) on",
    "base: layer",
    "eval loss 6",
    "eval loss 2.2",
    "verified:",
)
"""Beginnings of the lines that README shows of the quickstart."""


def page() -> str:
    """README with every section filled."""
    return fill(PAGE.read_text(), SECTIONS)


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _parity() -> list[dict[str, Any]]:
    """Cases in float32; those in bfloat16 have a column for plain transformers beside them."""
    rows = _results("parity")["rows"]
    return [row for row in rows if "plain" not in row]


def _layouts(rows: list[dict[str, Any]]) -> int:
    """Number of different layouts among the cases."""
    # Cases differ in model and adapter as well; DP is what is left of the world by the others.
    found = set()
    for row in rows:
        found.add(tuple(row[axis] for axis in ("world", "tp", "cp", "pp", "vpp", "ep", "etp")))
    return len(found)


def _counted_memory() -> list[dict[str, Any]]:
    """Rows that compare the planner's memory with live tensors counted on CPU ranks."""
    return [row for row in _results("planner_accuracy")["rows"] if row["table"] == "memory"]


def _largest_error(key: str) -> float:
    """Largest relative error of the planner's memory, over all counted layouts."""
    largest = 0.0
    for row in _counted_memory():
        error = row["said"][key] / row["found"][key] - 1
        # Too much and too little count alike.
        largest = max(largest, abs(error))
    return largest


def _counted_layouts() -> int:
    # A layout has a row for each of its pipeline stages.
    layouts = {row["layout"] for row in _counted_memory()}
    return len(layouts)


def _largest(rows: list[dict[str, Any]], key: str) -> float:
    return max(row[key] for row in rows)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def claims() -> str:
    """Four claims, a number each."""
    rows = _parity()
    # Over the largest entry of the same projection: ``of_largest`` in tests/parity/compare.py.
    adapters = _largest(rows, "adapters")
    peak = _percent(_largest_error("peak"))
    # Rounded down, so that README need not change with every bug that is added.
    bugs = len(EVERY_BUG) // 50 * 50
    found = (
        "**The layout does not change the result.** After five training steps in each of"
        f" {_layouts(rows)} layouts of up to 8 ranks, adapters equal those of plain transformers in"
        f" float64 to {adapters:.1e}; one step is 1e-4.",
        "**The adapter loads elsewhere unchanged.** Log-probabilities from vLLM, stock PEFT and"
        " megalora differ by at most 2.4e-06 for seven kinds of adapters; greedy tokens are"
        " identical.",
        f"**The planner knows what LoRA costs.** Its peak memory is within {peak} of what live"
        f" tensors take in {_counted_layouts()} layouts on CPU ranks, and within"
        f" {_planner_error('peak_bytes'):.2f} % on an H100.",
        "**Silent mistakes are caught.** A named test catches each of more than"
        f" {bugs} seeded bugs.",
    )
    items = []
    for claim in found:
        item = textwrap.fill(claim, MAX_COLUMNS, initial_indent="- ", subsequent_indent="  ")
        items.append(item)
    return "\n".join(items)


def quickstart() -> str:
    """Lines that the quickstart prints."""
    lines = _results("quickstart")["lines"]
    shown = [line for line in lines if line.startswith(QUICKSTART_LINES)]
    return "\n".join(["```console", "$ make quickstart", *shown, "```"])


def plan() -> str:
    """The command, and the three best rows of its table."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.chdir(ROOT):
        megalora([*PLAN])
    lines = printed.getvalue().splitlines()
    # Above the table the command says what it assumes; the table's head begins with "tp  pp".
    head = 0
    while lines[head].split()[:2] != ["tp", "cp"]:
        head += 1
    command = " ".join(["megalora", *PLAN])
    shown = ["```console", f"$ {command}"]
    # The head and the three rows that --top 3 asks for.
    for line in lines[head : head + 4]:
        shown.append(line.rstrip())
    return "\n".join([*shown, "```"])


def support() -> str:
    """Families by parallelisms, PEFT and vLLM, with what each mark means."""
    return support_matrix.table(support_matrix.read_results())


def numbers() -> str:
    """Five measured numbers, each with its command and its record."""
    gradient = _largest(_parity(), "gradient")
    hour = _results("first_hour")
    low, high = _cost_of_lora()
    rows = (
        (
            "largest error of a gradient, all layouts",
            f"{gradient:.1e}",
            "make parity",
            "parity",
        ),
        (
            "H100, busy: PEFT's and Unsloth's step over ours",
            f"{_step_over_ours('peft'):.2f}, {_step_over_ours('unsloth'):.2f}",
            "python -m benchmarks.peers",
            "gpu_peers",
        ),
        (
            "H100: experts, LoRA over none",
            f"{low:.2f} to {high:.2f}",
            "python -m benchmarks.bench_grouped_lora",
            "gpu_kernels",
        ),
        (
            "H100, calibrated: planner's error",
            f"{_planner_error('step_ms'):.1f} %, {_planner_error('peak_bytes'):.2f} %",
            "python -m benchmarks.model_plan",
            "gpu_planner",
        ),
        (
            f"step 1, first answer ({hour['cores']} cores, {hour['date']})",
            f"{hour['first_step_s']:.0f} s, {hour['first_served_answer_s']:.0f} s",
            "python -m benchmarks.first_hour",
            "first_hour",
        ),
    )
    lines = ["| what, on a CPU or an H100 | measured | command |", "|---|--:|---|"]
    # Links stand below the table, numbered: inside the cells they would make lines of more than
    # 100 columns.
    links = []
    for number, (what, measured, command, name) in enumerate(rows, start=1):
        lines.append(f"| {what} | [{measured}][{number}] | `{command}` |")
        links.append(f"[{number}]: benchmarks/results/{name}.json")
    return "\n".join([*lines, "", *links])


def _step_over_ours(arm: str) -> float:
    """A peer's step over megalora's in the same round, the median."""
    [case] = _results("gpu_peers")["cases"]
    [row] = [row for row in case["rows"] if row["arm"] == arm]
    return row["over_megalora"]["step"]["median"]


def _cost_of_lora() -> tuple[float, float]:
    """The least and the most that forward and backward of all experts of a layer take with
    adapters, over the same without."""
    wanted = "forward + backward over the base"
    ratios = []
    for row in _results("gpu_kernels")["goals"]:
        # Cases called "linear ..." are one projection of the experts, not all of them.
        if row["goal"] == wanted and not row["case"].startswith("linear"):
            ratios.append(row["value"])
    return min(ratios), max(ratios)


def _planner_error(key: str) -> float:
    """Largest error of the calibrated planner on a GPU, in percent."""
    errors = []
    for case in _results("gpu_planner"):
        # The record has each case twice: with the rates measured on that GPU, and with those that
        # the planner assumes for its kind.
        if case["rates"] == "calibrated":
            errors.append(abs(case[key]["error_percent"]))
    return max(errors)


SECTIONS: dict[str, Callable[[], str]] = {
    "claims": claims,
    "quickstart": quickstart,
    "plan": plan,
    "support": support,
    "numbers": numbers,
}
"""Name in the page's comments to the function that writes the section."""
