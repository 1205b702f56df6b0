"""Run the benchmark of saving at a small size."""

import json
from pathlib import Path

import pytest

from benchmarks import save_cost


@pytest.mark.slow
def test_save_cost_runs_at_a_small_size(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    tiny = ["--every", "2", "--saves", "1", "--batch", "8", "--repeats", "2", "--tiny"]
    save_cost.main([*tiny, "--folder", str(tmp_path), "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["command"].endswith(f"--tiny --folder {tmp_path} --out {out}")
    (share,) = record["blocked"]["share"]
    assert 0 < share < 1
    assert [row["world"] for row in record["state"]] == [1, 2, 4]
    one, *more = record["state"]
    for row in more:
        assert row["elements"] == row["world"] * one["elements"]
    # A layer on one rank, in two snapshots, beside the states of generators on the CPU.
    generators = one["snapshot_bytes"] / 2 - 12 * one["elements"]
    assert generators > 0 and generators % 5056 == 0
    for row in record["state"]:
        assert 0 < row["seconds_per_gb"] <= row["median_seconds_per_gb"]
        assert max(row["blocked_s"]) < max(row["seconds"])
    # Nothing is left on the disk that was measured.
    assert list(tmp_path.iterdir()) == [out]
