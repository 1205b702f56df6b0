"""Prove for each family of models what the table of support says: layouts, PEFT, vLLM.

    python -m benchmarks.support [FAMILY ...] [--vllm] [--out benchmarks/results/support.json]

For each family, trainings in layouts that use every kind of parallelism and recomputation once are
compared with plain transformers in float64 (tests/parity/case.py has the limits). Then an adapter
on all linears, loaded by stock PEFT and, with --vllm, served by vLLM, is compared with megalora's
own model. A family's record replaces its earlier one from the same kind of device; all others stay.
``benchmarks/support_matrix.py`` makes the table. The exit code is 1 where a claim does not hold.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  sets up the host before anything from Megatron is imported
from benchmarks.harness import PACKAGES
from benchmarks.parity import AT_ONCE, Laboratory, one_of_each_question
from megalora import host
from megalora.adapters.write.engines import FileFormat
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape
from megalora.tiny import make_tiny
from megalora.verify.peft import verify_peft
from megalora.verify.vllm import verify_vllm
from megalora.versions import commit
from tests.forked import forked
from tests.parity.built import random_factors
from tests.parity.case import LIMITS
from tests.parity.grid import Case
from tests.parity.models import MODELS, arch_of, make_model, make_teacher, shape_of

RESULTS = Path("benchmarks/results/support.json")
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"world": 1},
    {"world": 2, "tp": 2, "recompute": "full"},
    {"world": 2, "pp": 2, "recompute": "selective"},
    {"world": 4, "tp": 2, "pp": 2, "vpp": 2},
)
EXPERT_LAYOUTS: tuple[dict[str, Any], ...] = (
    {"world": 2, "ep": 2, "recompute": "selective"},
    {"world": 4, "tp": 2, "ep": 2, "etp": 2, "recompute": "full"},
)
IN_VLLM: dict[str, dict[str, Any]] = {"qwen2_moe": {"hidden_size": 192}}
"""Sizes that vLLM 0.32 needs by family: for Qwen2-MoE it does not read head_dim but divides
hidden_size by the number of heads, which is right for every published model."""
ATOL = 1e-4
"""Largest difference of a logit in float32, as in ``megalora verify``."""
VLLM_ATOL = 1e-3
"""Largest difference of a log-probability: vLLM's kernels add in an order of their own."""


def model_of(family: str) -> str:
    """The grid's plain model of a family."""
    for name, options in MODELS.items():
        if arch_of(options) == family:
            return name
    raise LookupError(f"tests/parity/models.py has no model of the family {family!r}")


def cases_of(family: str) -> list[Case]:
    """A training for each layout that the family's model can be split into."""
    model = model_of(family)
    layouts = LAYOUTS
    if shape_of(model).moe_layers:
        layouts += EXPERT_LAYOUTS
    return [Case(**layout, model=model) for layout in layouts]


def adapter_on_everything(
    family: str, folder: Path, layout: FileFormat, **sizes: Any
) -> tuple[Path, Path]:
    """Make a base and an adapter on all its linears, with random factors; returns their folders."""
    base = make_tiny(folder / "base", arch=family, **sizes)
    shape = model_shape(read_hf_config(base))
    adapted, factors = random_factors(LoRAConfig(rank=8, alpha=16.0), base)
    adapter = folder / "adapter"
    adapter.mkdir()
    write_adapter(adapter, adapted, shape, factors, str(base), layout)
    return base, adapter


def claims_of(family: str, with_vllm: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Each claim about another program to the function that proves it, in the format that the
    program reads."""
    has_experts = bool(shape_of(model_of(family)).moe_layers)
    stacked = has_experts and not FAMILIES[family].peft.per_expert

    def peft() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            layout = "stacked" if stacked else "per_expert"
            base, adapter = adapter_on_everything(family, Path(folder), layout)
            report = verify_peft(adapter, str(base), atol=ATOL)
        return {"ok": report.ok, "difference": report.difference, "effect": report.effect}

    def vllm() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            sizes = IN_VLLM.get(family, {})
            # vLLM reads one adapter for each expert, whatever the family's layout in PEFT.
            base, adapter = adapter_on_everything(family, Path(folder), "per_expert", **sizes)
            report = verify_vllm(adapter, str(base), atol=VLLM_ATOL)
        difference = max(report.prompt, report.greedy)
        return {"ok": report.ok, "difference": difference, "effect": report.effect}

    claims = {"peft": peft}
    if with_vllm:
        claims["vllm"] = vllm
    return claims


def rows_of(family: str, laboratory: Laboratory, with_vllm: bool) -> list[dict[str, Any]]:
    """One row for each layout and for each claim about others' programs."""
    cases = cases_of(family)
    make_model(cases[0].model, laboratory.base(cases[0].model))
    make_teacher(laboratory.base(cases[0].model))
    # The oracle's answers have to be there before the layouts run.
    questions = [(c, laboratory.ask_oracle, (c,)) for c in one_of_each_question(cases)]
    for _ in forked(questions, AT_ONCE):
        pass
    jobs: list[Any] = []
    for case in cases:
        jobs.append((case.name, laboratory.run, (case.name, case)))
    for claim, job in claims_of(family, with_vllm).items():
        name = f"{family} {claim}"
        jobs.append((name, laboratory.keep, (name, {"claim": claim}, job)))
    for name, seconds, _ in forked(jobs, AT_ONCE):
        print(f"{name:62} {seconds:4.0f} s", flush=True)
    # Jobs end in any order; the record keeps the order of the table.
    rows = []
    for name, *_ in jobs:
        row = json.loads(laboratory.row(name).read_text())
        rows.append(row if "claim" in row else _of_layout(row))
    return rows


def _of_layout(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a case that the table needs, with its deviations."""
    found: dict[str, Any] = {"claim": "layout"}
    for name in ("world", "tp", "pp", "vpp", "ep", "etp", "recompute"):
        found[name] = row[name]
    found["ok"] = not (row["failed"] or row.get("exceeded"))
    found["failed"] = row["failed"]
    # A training that failed has none of them.
    for name in LIMITS:
        if name in row:
            found[name] = row[name]
    return found


def keep(record: dict[str, Any], out: Path) -> None:
    """Put a family's record in the place of its earlier one from the same kind of device."""
    earlier = json.loads(out.read_text()) if out.exists() else []
    records = [record]
    for other in earlier:
        # A CPU's record says nothing of a GPU's, so both stay.
        if other["family"] != record["family"] or other["on_gpu"] != record["on_gpu"]:
            records.append(other)
    # Families in the order of the table, so that a rerun changes no line of another family.
    order = list(FAMILIES)
    records.sort(key=lambda r: (order.index(r["family"]), r["on_gpu"]))
    out.write_text(json.dumps(records, indent=1) + "\n")


def all_hold(family: str, rows: list[dict[str, Any]]) -> bool:
    """Whether every claim holds; those that do not are printed with the reason."""
    good = True
    for row in rows:
        # A job that crashed left no verdict.
        row["ok"] = bool(row.get("ok"))
        if not row["ok"]:
            print(f"{family}: {row['claim']} does not hold\n{row['failed'] or row}")
            good = False
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--vllm", action="store_true", help="serve the adapter with vLLM too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for name in args.families:
        if name not in FAMILIES:
            parser.error(f"{name!r} is not a family; families: {', '.join(FAMILIES)}")
    good = True
    for family in args.families or FAMILIES:
        # A folder for each family: models and runs of several would fill a small disk.
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_of(family, Laboratory(Path(folder)), args.vllm)
        good = all_hold(family, rows) and good
        record = {
            "family": family,
            "device": host.device_name(),
            "on_gpu": host.device().type == "cuda",
            "commit": commit(),
            "versions": {package: version(package) for package in PACKAGES},
            "rows": rows,
        }
        # At once, so that a later family's crash loses nothing.
        keep(record, args.out)
    sys.exit(not good)


if __name__ == "__main__":
    main()
