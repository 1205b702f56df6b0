"""The summary of a run on a GPU, in one table: by how much goals are met, and what is missing or
refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_summary
from benchmarks.goals import BASE, EVERY, QUACK, TRAIN, Verdict
from benchmarks.gpu_summary import NOT_YET, by_how_much, of_goals

# Records as the steps write them, as short as they can be: each with a row that went well and one
# that did not, where there can be both.
PHASE = {"count": 20, "per_layer": 7, "us": 100.0}
PROFILE = {
    "phases": {"forward": PHASE, "backward": {**PHASE, "per_layer": 9}}, "idle_share": 0.125,
    "notable_gaps": 3,
    "waits": {"cudaStreamSynchronize": {"count": 2, "us": 9.0, "in": {"update: aten::item": 4}}},
    "kernels": [{"name": "gemm", "phase": "forward", "share": 0.5}],
}  # fmt: skip
GIB = 2**30


def kernels(train: float, base: float) -> dict[str, Any]:
    """Verdicts on training over the base (at most 1.3), on its TFLOP/s (at least 550), on quack."""
    goals = []
    for goal, value in ((TRAIN, train), (BASE, base), (QUACK, 1.05)):
        goals.append(vars(Verdict.of(goal, "8k", value)))
    return {"device": "H", "goals": goals, "failures": [], "not_reached": ["far"]}


RECORDS: dict[str, dict[str, Any]] = {
    "gpu_tests.json": {
        "rows": [{"test": "a", "outcome": "passed", "why": ""},
                 {"test": "b", "outcome": "skipped", "why": "no"}],
        "failures": [], "not_reached": [],
    },
    "gpu_anchors.json": {
        "rows": [
            {"anchor": "copy", "status": "ok", "value": 3.0, "unit": "TB/s",
             "verdict": "as expected",
             "expected": {"low": 2.8, "high": 3.2}},
            {"anchor": "dense", "status": "broken", "value": None, "unit": "TFLOP/s",
             "verdict": "FAILED",
             "expected": None},
        ],
        "not_reached": [],
    },
    # Before tuning both goals are missed by 10 and 20 %; the tuned table meets both by 10 %.
    "gpu_kernels.json": kernels(1.43, 440.0),
    "gpu_tuned.json": {
        "rows": [{"us": 100.0, "rule_us": 150.0}, {"us": 5.0, "rule_us": None}],
        "rule_stands": [{}],
        "layers": [{"dtype": "bfloat16", "hidden": 2048, "intermediate": 768, "R": 16,
                    "vendor_from": 512}],
        "sweep": {"refused": {"v": "hung"}, "not_reached": []},
    },
    "gpu_kernels_tuned.json": kernels(1.17, 605.0),
    "gpu_coded.json": {
        "rows": [{"case": "nf4, 64 rows", "arm": "in load", "status": "ok", "us": 250.0,
                  "over_plain": 0.75},
                 {"case": "nf4, 64 rows", "arm": "first", "status": "off by 2", "us": None,
                  "over_plain": None}],
        "not_reached": [],
    },
    "gpu_model.json": {
        # An arm without a time is a row all the same.
        "rows": [
            {"arm": "megalora", "layers": 8, "status": "ok", "tokens_per_s": 12345.6,
             "tflops": 300.0,
             "peak_bytes": 50 * GIB, "step_ms": 200.0, "profile": PROFILE,
             "planned": {"peak_bytes": 55 * GIB, "step_ms": 150.0},
             "error_percent": {"peak_bytes": 10.0, "step_ms": -25.0}},
            {"arm": "peft", "layers": 8, "status": "out of memory"},
        ],
    },
    "gpu_peers.json": {
        "cases": [{"shape": "30b", "tokens": 4096, "wrong": [], "rows": [
            {"arm": "peft", "status": "ok", "over_megalora": {"step": {"median": 3.25}},
             "peak_bytes": 2 * GIB,
             "step_ms": {"median": 400.0}},
            {"arm": "unsloth", "status": "not installed"},
        ]}],
    },
    "gpu_shared.json": {
        "rows": [
            {"case": "tp2", "failed": None, "loss": 1e-8, "gradient": 1e-6, "exceeded": []},
            {"case": "pp2", "failed": None, "loss": 1e-2, "gradient": 1e-1,
             "exceeded": ["loss 1e-2 > 1e-6"]},
            {"case": "ep2", "failed": "Traceback\nValueError: x\n", "exceeded": []},
        ],
        "not_reached": ["etp2"],
    },
    "gpu_long.json": {
        "rows": [
            {"check": "packed", "status": "ok", "line": "loss 1e-8"},
            {"check": "cp", "status": "FAILED: loss 1e-1 > 5e-3", "line": "loss 1e-1"},
            {"check": "flash4", "status": "not installed", "line": "no module"},
        ],
        "not_reached": ["memory"],
    },
    "gpu_calibration.json": {
        "gemm": [1], "grouped_gemm": [1, 2], "attention": [], "memory": [],
        "overhead": {"layer_forward_s": 1e-4, "layer_backward_s": 2e-4},
    },
    "gpu_layouts.json": {
        "rows": [{"asked": "recompute=full", "status": "ok",
                  "measured": {"tokens_per_second_per_gpu": 9000.0},
                  "error_percent": {"step_seconds": 4.0, "peak_bytes": -1.5}}],
        "not_reached": [],
    },
    "gpu_all.json": {"steps": {"tests": {"seconds": 55.0, "why": "", "result": "ok"}}},
}  # fmt: skip


@pytest.fixture
def results(tmp_path) -> Path:
    for name, record in RECORDS.items():
        (tmp_path / name).write_text(json.dumps(record))
    return tmp_path


def verdict_of(goal: str, lines: list[Any]) -> str:
    """The verdict of the one line about a goal."""
    (line,) = [line for line in lines if line.what.startswith(goal)]
    return line.verdict


def row(text: str, *words: str) -> str:
    """The one row of the table that has all of the words."""
    found = []
    for line in text.splitlines():
        if all(word in line for word in words):
            found.append(line)
    assert len(found) == 1, (words, found)
    return found[0]


def test_everything_in_one_table(results, capsys):
    assert gpu_summary.main([str(results)]) == 0
    said = capsys.readouterr().out
    # The tuned value decides: 1.17 of 1.3, and 605 over 550.
    assert "met: by 10 %" in row(said, TRAIN.name, "1.430, tuned 1.170", "must <= 1.3")
    assert "met, good: by 10 %" in row(said, BASE.name, "440.000, tuned 605.000", "must >= 550")
    assert "not worth being the base: 1.05 times" in row(said, QUACK.name)
    assert row(said, "tests", "1 passed", "1 skipped").endswith("ok")
    assert "as expected" in row(said, "anchor: copy", "3.00 TB/s", "2.8 to 3.2")
    assert "FAILED: broken" in row(said, "anchor: dense")
    assert "the rule stands for 1" in row(said, "tuned products", "2", "1.50 to 1.50 times")
    assert "from 512 rows per expert" in row(said, "back end: bfloat16 2048 x 768")
    assert "7 forward, 9 backward" in row(said, "kernels of a layer")
    # An eighth of the step. A step of training may not wait for the device at all.
    assert "12 %" in row(said, "GPU idle")
    assert row(said, "waits of the host", "2", "FAILED")
    assert row(said, "update: aten::item")
    assert row(said, "12346 tokens/s", "peak 50.0 GiB")
    assert "off by +10.0 %" in row(said, "megalora", "50.0 GiB", "predicted 55.0 GiB")
    assert "off by -25.0 %" in row(said, "megalora", "200.0 ms", "predicted 150.0 ms")
    assert row(said, "train: peft", "out of memory")
    assert row(said, "unsloth", "not installed")
    # 4,096 tokens in 400 ms.
    assert "10240 tokens/s" in row(said, "30b: peft", "3.25 times megalora's step", "2.00 GiB")
    assert row(said, "shared: tp2", "pass")
    assert row(said, "shared: pp2", "FAILED", "loss 1e-2")
    # Of a traceback its last line.
    assert row(said, "shared: ep2", "ValueError: x", "FAILED")
    assert row(said, "shared: etp2", "not reached")
    assert row(said, "codes: nf4, 64 rows: in load", "250 us", "0.75 times plain weights")
    assert row(said, "codes: nf4, 64 rows: first", "FAILED: off by 2")
    # 100 us forward and 200 backward.
    assert row(said, "calibration", "2 grouped_gemm", "host 300 us")
    assert "off by +4.0 %" in row(said, "planner: layout", "step_seconds")
    assert row(said, "step: tests", "55 s", "ok")


def test_what_is_missing_says_so(tmp_path, capsys):
    assert gpu_summary.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for goal in EVERY:
        assert NOT_YET in row(said, goal.name)
    assert said.startswith("nothing was measured")
    for name in ("tests", "anchors", "tuned", "model", "peers", "shared", "calibration", "layouts"):
        assert row(said, f"{name} ", NOT_YET)


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_that_is_no_record_is_refused_by_name(results, name, capsys):
    """Any field that is gone is missed; the other files are shown all the same."""
    # Cut off in the middle, a list, and an object without a single field.
    for spoilt in ("{", "[1]", "{}"):
        (results / name).write_text(spoilt)
        assert gpu_summary.main([str(results)]) == 1, spoilt
        said = capsys.readouterr()
        assert f"REFUSED {results / name}: not the record" in said.err
        assert said.err.count("REFUSED") == 1
        assert "tests" in said.out
    for gone in RECORDS[name]:
        # The device is named only where it is known.
        if gone == "device":
            continue
        record = dict(RECORDS[name])
        del record[gone]
        (results / name).write_text(json.dumps(record))
        assert gpu_summary.main([str(results)]) == 1, gone


def test_one_folder_is_wanted(tmp_path, capsys):
    assert gpu_summary.main([str(tmp_path / "no")]) == 2
    assert "want one folder" in capsys.readouterr().err


def test_by_how_much():
    # At most 1.3: on the limit, and a tenth above.
    assert by_how_much(TRAIN, 1.3) == "met: by 0 %"
    assert by_how_much(TRAIN, 1.43) == "MISSED by 10 %"
    # At least 550: a tenth below, and on the limit, which is also what is called good.
    assert by_how_much(BASE, 495.0) == "MISSED by 10 %"
    assert by_how_much(BASE, 550.0) == "met, good: by 0 %"
    # No goal of ours: it says whether another kernel should be the base.
    said = by_how_much(QUACK, 1.2)
    assert "worth being the base" in said and "not" not in said


def test_only_the_last_measurement_decides():
    """A goal that the table made worse is missed; one that was measured before tuning alone counts
    as it was."""
    worse = of_goals(
        {gpu_summary.KERNELS: kernels(1.1, 600.0), gpu_summary.TUNED: kernels(1.5, 600.0)}
    )
    assert verdict_of(TRAIN.name, worse) == "MISSED by 15 %"
    alone = of_goals({gpu_summary.KERNELS: kernels(1.1, 600.0)})
    assert verdict_of(TRAIN.name, alone).startswith("met, good")


def test_a_long_reason_does_not_widen_the_table():
    """Nobody can read rows of hundreds of characters: the long one comes last, in another form."""
    short = gpu_summary.Line("copy", "3.00 TB/s", "", "as expected")
    reason = "cannot run: " + 200 * "x"
    long = gpu_summary.Line(f"kernels: {reason}", "-", "", "FAILED")
    *table, below = gpu_summary.show([short, long]).splitlines()
    assert max(map(len, table)) < 60
    assert below == f"FAILED | kernels: {reason}"
