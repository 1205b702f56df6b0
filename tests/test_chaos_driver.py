"""What ``make chaos`` keeps of a call that was cut off."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import __main__ as driver
from benchmarks.chaos.fault import HANG, SURVIVED, Fault


class Cut(Exception):
    """The driver has been killed."""


def kind(name: str, results: list[str], tried: list[str], *, cut: bool = False) -> driver.Kind:
    """Something that is done to nothing."""

    def run(scene: Any, scratch: Path, times: int) -> Iterator[Fault]:
        tried.append(name)
        for number, result in enumerate(results):
            yield Fault(name, f"{number}", result, 1.0)
        if cut:
            raise Cut

    return driver.Kind(run, 1, 1, holds=False)


def test_a_call_that_is_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    out = tmp_path / "chaos.json"
    monkeypatch.setattr(driver, "make_scene", driver.Scene)

    def call(kinds: dict[str, driver.Kind], *arguments: str) -> int:
        monkeypatch.setattr(driver, "KINDS", kinds)
        monkeypatch.setattr(sys, "argv", ["chaos", "--out", str(out), *arguments])
        with pytest.raises(SystemExit) as ended:
            driver.main()
        return int(ended.value.code or 0)

    whole = kind("a", [SURVIVED] * 60, tried)
    with pytest.raises(Cut):
        call({"a": whole, "b": kind("b", [SURVIVED] * 45, tried, cut=True)})
    record = json.loads(out.read_text())
    # 50 faults at a time are kept of a kind that is not done.
    assert record["done"] == ["a"] and len(record["faults"]) == 100
    assert call({"a": whole, "b": kind("b", [SURVIVED] * 45, tried)}, "--go-on") == 0
    assert tried == ["a", "b", "b"]
    record = json.loads(out.read_text())
    assert [row["times"] for row in record["rows"]] == [60, 45]
    # One more kind, and what a call before has found counts for the exit code.
    assert call({"a": whole, "b": whole, "c": kind("c", [HANG], tried)}, "--kinds", "c") == 1
    assert call({"a": whole, "b": whole, "c": whole}, "--go-on") == 1
    assert tried == ["a", "b", "b", "c"]
    assert len(json.loads(out.read_text())["faults"]) == 106
