"""Compare steps that were measured on a GPU with what the planner says of them today."""

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
    own = []
    for row in rows:
        if row["status"] == "ok" and row["arm"].startswith("megalora"):
            own.append(row)
    # There are others to be mixed up with.
    assert 2 <= len(own) < len(rows)
    cases = model_plan.beside_measured()
    for rates in ("table", "calibrated"):
        found = [case for case in cases if case["rates"] == rates]
        for case, row in zip(found, own, strict=True):
            assert case["step_ms"]["measured"] == row["step_ms"]
            assert case["peak_bytes"]["measured"] == row["peak_bytes"]
    # The same step with rates of the data sheet and with calibrated ones.
    assert cases[0]["step_ms"]["predicted"] != cases[1]["step_ms"]["predicted"]
    error = 100 * (cases[0]["step_ms"]["predicted"] / own[0]["step_ms"] - 1)
    assert cases[0]["step_ms"]["error_percent"] == pytest.approx(error, abs=1e-3), "rounded"
