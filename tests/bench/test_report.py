"""The report of a benchmark: its table, its files and its picture."""

import csv
from dataclasses import replace
from typing import Any

import pytest
import torch

from megalora.bench.results import table, write_results
from megalora.bench.rows import PARTS, Measured, Row, load_rows
from tests.bench.made_up_rows import MEASURED, predicted


@pytest.fixture
def rows() -> list[Row]:
    """A fast and a slow layout, and between them one that ran out of memory."""
    measured = Measured(**MEASURED)  # type: ignore[arg-type]
    prediction = predicted(None, 2)  # type: ignore[arg-type]
    # Half as fast, and without expert parallelism, so that it has no imbalance to show.
    slower = replace(
        measured,
        tokens_per_second_per_gpu=404.0,
        step_seconds=1.0,
        imbalance=None,
        imbalance_worst=None,
    )
    fast = "tp=1 ep=2 micro=1 recompute=off"
    slow = "tp=2 ep=1 micro=1 recompute=off"
    too_large = "tp=2 ep=2 micro=8 recompute=full"
    no_memory = "out of memory"
    return [
        row("b", slow, measured=slower),
        row("c", too_large, status=no_memory, predicted=prediction),
        row("a", fast, measured=measured, predicted=prediction),
    ]


def row(key: str, layout: str, status: str = "ok", **found: Any) -> Row:
    return Row(key=key, layout=layout, status=status, log="l", seconds=9, **found)


def test_the_table(rows: list[Row]) -> None:
    text = table(rows)
    # One line in the table of speeds, one in the table of parts.
    found = []
    for line in text.splitlines():
        if line.startswith("tp=1"):
            found.append(line.split())
    # Tokens a second, TFLOP/s, then measured, predicted and the difference in percent: 400 ms are
    # 20 % less than 500, 2 GiB a third less than 3.
    assert found[0][4:] == ["ok", "808", "1.50", "500.0", "400.0", "-20.0", "3.00", "2.00", "-33.3"]
    # Each part in ms, their sum as measured without and with marks, the imbalance.
    assert found[1][4:] == ["60.0"] * len(PARTS) + ["500.0", "540.0", "1.250", "1.500"]
    assert text.index("tp=1 ep=2") < text.index("tp=2 ep=1") < text.index("tp=2 ep=2"), (
        "the fastest first"
    )
    for said in ("4 P + 6 A + 2 W + 6 S h d L", "predicted from a guess", "out of memory"):
        assert said in text


def test_the_files(rows: list[Row], tmp_path) -> None:
    paths = write_results(rows, tmp_path / "report")
    assert load_rows(paths["json"]) == rows
    again = replace(rows[1], status="timed out")
    write_results([again], tmp_path / "report")
    # "c" alone was measured again and replaces its row; "b" and "a" stay.
    assert load_rows(paths["json"]) == [rows[0], again, rows[2]], (
        "a report of some rows loses none of the others"
    )
    write_results(rows, tmp_path / "report")
    with paths["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [line["status"] for line in lines] == ["ok", "out of memory", "ok"]
    assert lines[2]["attention_seconds"] == "0.06"
    assert lines[2]["predicted_attention_seconds"] == "0.3"
    # What was not measured is an empty cell, never 0.
    assert lines[1]["step_seconds"] == "" and lines[1]["predicted_step_seconds"] == "0.4"
    # The fullest of two ranks.
    assert lines[0]["peak_bytes"] == str(3 * 2**30)
    with pytest.raises(ValueError, match="no row to report"):
        write_results([], tmp_path)


def test_the_picture(rows: list[Row], tmp_path) -> None:
    from matplotlib.image import imread

    paths = write_results(rows, tmp_path / "report")
    picture = imread(paths["png"])
    assert picture.shape[0] > 300 and picture.shape[1] > 1000
    # Two bars each in the colours of measured (blue) and predicted (grey), at least 20 pixels
    # thick; edges are blended with white and do not count.
    for colour in ((0, 0x72, 0xB2), (0xBB, 0xBB, 0xBB)):
        exact = (abs(picture[..., :3] * 255 - torch.tensor(colour).numpy()) < 1).all(-1)
        assert exact.any(1).sum() > 20 * 2 and exact.sum() > 5000


def test_a_report_without_a_single_success(tmp_path) -> None:
    # An error of 300 letters must not make the table wider than a screen.
    row = Row(key="a", layout="tp=1", status=f"failed: {'x' * 300}", log="where.log", seconds=1)
    assert "see where.log" in table([row]) and max(map(len, table([row]).splitlines()[:3])) < 200
    assert write_results([row], tmp_path)["png"].stat().st_size > 5000
