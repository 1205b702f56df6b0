"""The table of support marks what its results prove, for every registered family."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support import cases_of, keep
from benchmarks.support_matrix import COLUMNS, mark, of_parity, of_shared, read_results, table
from megalora.model.families import FAMILIES
from tests.parity.grid import accepted


def record(
    *rows: dict[str, Any], family: str = "qwen3_moe", on_gpu: bool = False
) -> dict[str, Any]:
    """Results of one family on one device."""
    return {"family": family, "on_gpu": on_gpu, "rows": list(rows)}


def layout(ok: bool = True, **sizes: Any) -> dict[str, Any]:
    """One case of the grid and whether it agreed with the oracle."""
    return {"claim": "layout", "ok": ok, **sizes}


def test_a_family_without_results_is_not_proved() -> None:
    # Below the table's head and its rule. A dense family has no experts to split: "n/a".
    lines = table([]).splitlines()[2 : 2 + len(FAMILIES)]
    for line, family in zip(lines, FAMILIES, strict=True):
        _, name, *marks, _ = line.split("|")
        assert f"`{family}`" in name
        assert set(marks) <= {" - ", " n/a "}
        assert marks[0] == " - "


def test_marks() -> None:
    records = [
        record(layout(), layout(tp=2), layout(tp=2, ep=2, ok=False), {"claim": "peft", "ok": True})
    ]
    assert mark("PEFT", records) == "CPU"
    assert mark("PP", records) == "-", "no case has it"
    assert mark("EP", records) == "-", "its case failed"
    assert mark("TP", records) == "-", "one of its cases failed"
    # A GPU runs few of the cases: its mark needs all of a column's cases to hold on CPU ranks too.
    again = layout(tp=2, recompute="full")
    records = [record(layout(tp=2), again), record(again, on_gpu=True)]
    assert mark("TP", records) == "GPU"
    assert mark("recompute", records) == "GPU"
    assert mark("vLLM", records) == "-"
    # A case without recomputation is no proof of it.
    assert mark("recompute", [record(layout(recompute="off"))]) == "-"
    failed_there = record(layout(tp=2, ok=False), layout(ep=2), on_gpu=True)
    assert mark("TP", [record(layout(tp=2)), failed_there]) == "CPU"
    assert mark("TP", [record(layout(tp=2, ok=False)), record(layout(tp=2), on_gpu=True)]) == "-"
    assert mark("TP", [record(layout(tp=2), on_gpu=True)]) == "-", "not held against CPU ranks"


def test_cases_of_ranks_that_share_a_gpu() -> None:
    """Their record has names of cases, in which the sizes must be found again."""
    sizes_of = {
        "1:dp moe, all, off, 1": {"recompute": "off"},
        "4:tp2-ep2-etp2 moe, all, selective, 1": {
            "recompute": "selective", "tp": 2, "ep": 2, "etp": 2
        },
        "4:pp2-vpp2-ep2 moe, all, off, 1": {"recompute": "off", "pp": 2, "vpp": 2, "ep": 2},
    }  # fmt: skip
    kept = {"device": "NVIDIA H100", "commit": "f3d3bd1", "versions": {}}
    rows: list[dict[str, Any]] = []
    for name in sizes_of:
        rows.append({"case": name, "failed": None, "exceeded": []})
    rows[0]["failed"] = "exit code 1"
    rows[1]["exceeded"] = ["loss 1e-3 > 1e-6"]
    found = of_shared({**kept, "rows": rows})
    assert found["on_gpu"] and found["family"] == "qwen3_moe"
    # The first did not run, the second erred too much.
    one, two, three = sizes_of.values()
    assert found["rows"] == [layout(ok=False, **one), layout(ok=False, **two), layout(**three)]
    assert not of_shared({**kept, "device": "CPU", "rows": []})["on_gpu"]


def test_cases_of_the_grid() -> None:
    """Those in bfloat16 prove nothing; one that failed or erred too much takes its marks away."""
    held: dict[str, Any] = {"failed": None, "exceeded": [], "cp": 1, "micro": 1}
    rows: list[dict[str, Any]] = [
        {**held, "family": "qwen3_moe", "cp": 2},
        {**held, "family": "qwen3_moe", "micro": 0},
        {**held, "family": "qwen3", "cp": 4, "exceeded": ["loss 1e-3 > 1e-6"]},
        {**held, "family": "mixtral", "cp": 2, "plain": {}},
    ]
    kept = {"device": "CPU", "commit": "f3d3bd1", "versions": {}}
    moe, dense = of_parity({**kept, "rows": rows})
    assert (mark("CP", [moe]), mark("packed", [moe])) == ("CPU", "CPU")
    assert (dense["family"], mark("CP", [dense])) == ("qwen3", "-")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cases_of_a_family_can_fill_its_columns(family: str) -> None:
    cases = cases_of(family)
    for case in cases:
        assert accepted(case), case
    rows = [layout(**vars(case)) for case in cases]
    unmarked = set()
    for column in COLUMNS:
        if mark(column, [record(*rows)]) == "-":
            unmarked.add(column)
    # PEFT and vLLM are proved by other runs than layouts; the whole grid has parts of rows.
    expected = {"PEFT", "vLLM", "CP", "packed"}
    # Dense families have the four cases without experts.
    if len(cases) == 4:
        expected |= {"EP", "ETP"}
    assert unmarked == expected


def test_a_new_record_replaces_the_one_of_the_same_device(tmp_path: Path) -> None:
    # The first and the last are of the same family and device; the others must stay.
    out = tmp_path / "support.json"
    keep(record(layout(ok=False)), out)
    keep(record(layout(), on_gpu=True), out)
    keep(record(layout(), family="qwen3"), out)
    keep(record(layout()), out)
    kept = json.loads(out.read_text())
    assert [(found["family"], found["on_gpu"]) for found in kept] == [
        ("qwen3_moe", False),
        ("qwen3_moe", True),
        ("qwen3", False),
    ]
    for found in kept:
        assert found["rows"][0]["ok"] is True


def test_what_is_claimed_of_the_families_was_measured() -> None:
    """Every record is of a registered family, with its device and its versions."""
    for found in read_results():
        assert found["family"] in FAMILIES
        assert found["device"] and found["commit"] and found["versions"]["megatron-core"]
