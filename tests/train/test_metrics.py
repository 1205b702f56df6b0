"""Check what a resumed run keeps of metrics.jsonl."""

import json
from pathlib import Path

import pytest

from megalora.config import LogConfig
from megalora.train.metrics import Metrics


def resumed_at(step: int, folder: Path) -> list[str]:
    """Lines that are left when a run goes on after ``step``."""
    with Metrics(folder, LogConfig(tensorboard=False, progress=False), 9, step, active=True):
        pass
    return (folder / "metrics.jsonl").read_text().splitlines()


LINES = [json.dumps({"step": step, "loss": 1.0 / step}) for step in (1, 2, 3, 4)]


def test_later_steps_are_done_again(tmp_path: Path) -> None:
    # The last line was being written when the run was killed.
    (tmp_path / "metrics.jsonl").write_text("\n".join([*LINES, '{"step": 5, "lo']))
    assert resumed_at(2, tmp_path) == LINES[:2]
    assert resumed_at(0, tmp_path) == []


def test_damaged_lines_are_dropped_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A line that two writes share, JSON that is no record of a step, an empty line, and bytes that
    # are no UTF-8. Step 4 is a record, but later than where the run goes on.
    damaged = ['{"step": 1, "lo{"step": 2}', "{}", "[1]", '{"step": "1"}', "null", ""]
    lines = "\n".join([LINES[0], *damaged, LINES[1]])
    content = lines.encode() + b"\n\xff\xfe\n" + LINES[3].encode()
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert resumed_at(3, tmp_path) == LINES[:2]
    said = capsys.readouterr().out
    count = len(damaged) + 1
    assert f"{count} lines were not records of a step and have been removed" in said
