"""Steps measured on a GPU beside what the planner says of them today."""

import json

import pytest

from benchmarks import model_plan


def test_the_record_is_what_the_planner_says_today(capsys, monkeypatch, tmp_path):
    assert model_plan.main(["--check"]) == 0
    monkeypatch.setattr(model_plan, "RECORD", tmp_path / "gpu_planner.json")
    assert model_plan.main(["--check"]) == 1
    assert "gpu_planner.json is stale; run: python -m benchmarks.model_plan" in (
        capsys.readouterr().err
    )
    assert model_plan.main([]) == 0 and model_plan.main(["--check"]) == 0


def test_measured_numbers_are_those_of_megalora_s_own_rows():
    """Not those of other arms, nor of a row that has no time."""
    rows = json.loads((model_plan.RESULTS / "gpu_model.json").read_text())["rows"]
    own = [r for r in rows if r["status"] == "ok" and r["arm"].startswith("megalora")]
    assert len(own) >= 2 and len(own) < len(rows)
    cases = model_plan.beside_measured()
    for rates in ("table", "calibrated"):
        found = [case for case in cases if case["rates"] == rates]
        assert [c["step_ms"]["measured"] for c in found] == [r["step_ms"] for r in own]
        assert [c["peak_bytes"]["measured"] for c in found] == [r["peak_bytes"] for r in own]
    assert cases[0]["step_ms"]["predicted"] != cases[1]["step_ms"]["predicted"]
    error = 100 * (cases[0]["step_ms"]["predicted"] / own[0]["step_ms"] - 1)
    assert cases[0]["step_ms"]["error_percent"] == pytest.approx(error, abs=1e-3)  # rounded
