"""Run the anchors' whole path at tiny sizes; check what they say of a value, and that nothing wrong
gets a time."""

import json
from dataclasses import replace

import pytest

from benchmarks import anchor_cases, anchors
from benchmarks.anchor_cases import ANCHORS
from benchmarks.anchor_lab import Found, NotAvailableError
from benchmarks.anchor_machine import read_clock
from benchmarks.tile_gpus import H100, H200

BY_NAME = {anchor.name: anchor for anchor in ANCHORS}


def test_dry_run_and_a_second_call_that_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "anchors.json"
    # A budget of nothing: every anchor is left for a later call.
    assert anchors.main(["--dry", "--budget-seconds", "0", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["rows"] == [] and record["not_reached"] == list(BY_NAME)
    assert anchors.main(["--dry", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["not_reached"] == []
    measured = {row["anchor"]: row for row in record["rows"]}
    assert measured.keys() == BY_NAME.keys()
    for row in record["rows"]:
        assert (row["status"], row["verdict"]) == ("ok", "dry: means nothing"), row
    assert measured["base E16 x 4096, weights by TMA"]["more"]["variant"]["weight"] == "tma"
    capsys.readouterr()

    def again(_lab):
        raise AssertionError("measured a second time")

    refusing = [replace(anchor, measure=again) for anchor in ANCHORS]
    monkeypatch.setattr(anchors, "ANCHORS", tuple(refusing))
    assert anchors.main(["--dry", "--out", str(out)]) == 0
    # Rows of the first call stay as they were, and are shown again.
    assert json.loads(out.read_text())["rows"] == record["rows"]
    assert "base E128 x 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        ("grouped_gemm_triton", "base E128 x 512"),
        ("grouped_mm", "grouped_mm"),
        ("swiglu_triton", "SwiGLU + shrink"),
    ],
)
def test_what_is_wrong_gets_no_time(kernel, named, tmp_path, monkeypatch, capsys):
    """Each kernel with an output of which nothing, or twice too much, was written."""
    real = getattr(anchor_cases, kernel)

    def spoilt(*args, **how):
        # SwiGLU writes into the tensors that it is given, here into none; the GEMMs return theirs.
        result = None if kernel == "swiglu_triton" else real(*args, **how)
        return result if result is None else 2 * result

    monkeypatch.setattr(anchor_cases, kernel, spoilt)
    chosen = [anchor for anchor in ANCHORS if named in anchor.name]
    monkeypatch.setattr(anchors, "ANCHORS", tuple(chosen))
    out = tmp_path / "anchors.json"
    assert anchors.main(["--dry", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len(chosen) > 0
    for row in rows:
        assert row["value"] is None and row["verdict"] == "FAILED", row
    assert "is off by" in capsys.readouterr().out


def test_a_value_is_judged_by_its_range():
    anchor = BY_NAME["L2 reads of 24 MiB"]
    # 7 TB/s, a fifth less or more.
    expected = {"value": 7.0, "low": 5.6, "high": 8.4}

    def say(value: float, **other) -> str:
        return anchors.verdict(
            anchor, {"status": "ok", "value": value, "expected": expected, **other}, False
        )

    assert say(7.2) == "as expected"
    assert say(5.0) == f"below: {anchor.below}" and "too high" in anchor.below
    assert say(11.0) == f"above: {anchor.above}" and "too low" in anchor.above
    assert (
        say(7.0, expected=None) == "no expectation for this GPU"
        and say(7.0, status="no such kernel") == "FAILED"
    )


def test_expectations_by_hand():
    """By the tile model and by bytes over bandwidth; a range around each."""
    on_h100 = {name: anchor.expect(H100) for name, anchor in BY_NAME.items()}
    # Rates in TB/s (3.0 is what an H100 copies, 7.0 what its L2 reads); times of GEMMs in us, from
    # benchmarks/tile_model.py.
    # SwiGLU in us: 65,536 rows times the values read and written per row (y twice as wide as h,
    # and S), two bytes each, at 3 TB/s and 5 % beside.
    by_hand = {
        "copy of 1 GiB": 3.0, "L2 reads of 24 MiB": 7.0,
        "base E16 x 4096, the last release's tile": 978,
        "base E128 x 512, the rule": 736, "base E16 x 4096, weights by TMA": 736,
        "base E128 x 64, the rule": 288,
        "SwiGLU + shrink, 65,536 rows": 1.05 * 65536 * (3 * 768 + 16) * 2 / 3.0e6,
        "SwiGLU backward, 65,536 rows": 1.05 * 65536 * (5 * 768 + 48) * 2 / 3.0e6,
    }  # fmt: skip
    for name, value in by_hand.items():
        assert on_h100[name].value == pytest.approx(value, rel=1e-3), name
    for name, expected in on_h100.items():
        assert expected.low < expected.value < expected.high, name

    def on_h200_to_h100(name: str) -> float:
        return BY_NAME[name].expect(H200).value / on_h100[name].value

    # An H200's memory copies 4.3 TB/s, an H100's 3.0: rates rise, times fall by that.
    assert on_h200_to_h100("copy of 1 GiB") == pytest.approx(4.3 / 3.0)
    assert on_h200_to_h100("SwiGLU backward, 65,536 rows") == pytest.approx(3.0 / 4.3)
    assert on_h200_to_h100("base E16 x 4096, the rule") == 1.0, "bound by L2"


def test_mistakes_of_a_caller(tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"benchmark": "peers"}))
    wrong = {"--repeats 0": "at least 1", f"--dry --out {other}": "not of 'anchors'"}
    for given, text in wrong.items():
        with pytest.raises(SystemExit) as left:
            anchors.main(given.split())
        assert left.value.code == 2 and text in capsys.readouterr().err
    monkeypatch.setattr(anchors.backend, "INTERPRETED", False)
    with pytest.raises(SystemExit):
        anchors.main(["--dry"])
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err


# A fault makes the call fail; what this machine does not have does not.
@pytest.mark.parametrize(
    ("error", "code", "verdict", "status"),
    [
        (RuntimeError, 1, "FAILED", "RuntimeError: no"),
        (NotAvailableError, 0, "not available", "not available: no"),
    ],
)
def test_a_measurement_that_fails_is_a_row(error, code, verdict, status, monkeypatch, tmp_path):
    def fails(_lab) -> Found:
        raise error("no")

    first, second = ANCHORS[:2]
    monkeypatch.setattr(anchors, "ANCHORS", (replace(first, measure=fails), second))
    out = tmp_path / "anchors.json"
    assert anchors.main(["--dry", "--out", str(out)]) == code
    rows = json.loads(out.read_text())["rows"]
    assert (rows[0]["verdict"], rows[0]["status"]) == (verdict, status)
    # The row behind is measured all the same.
    assert rows[1]["status"] == "ok"


def test_what_nvidia_smi_says():
    fields = ("clocks.sm", "power.draw", "driver")
    found = read_clock("1755, 612.32, 580.65.06\n", fields)
    assert found.value == 1.755 and found.more == {
        "clocks.sm": "1755",
        "power.draw": "612.32",
        "driver": "580.65.06",
    }
    # No output, no reading, a field too few, no GPU.
    for said in ("", "[N/A], 612.32, 580.65.06\n", "1755, 612.32\n", "No devices were found\n"):
        with pytest.raises(NotAvailableError, match="does not tell the clock"):
            read_clock(said, fields)
