"""Check what a run reports of its steps, and what a resumed run keeps of metrics.jsonl."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megalora.config import LogConfig
from megalora.train import metrics
from megalora.train.metrics import Metrics
from megalora.train.run_logs import ShownAnswer
from tests.jsonl import read_jsonl


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


class Clock:
    """Seconds that a test decides."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_a_line_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step of total, loss, rate, speed, memory, and the time that is left at the pace so far."""
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(metrics, "peak_memory_bytes", lambda: 3 * 2**29)
    config = LogConfig(tensorboard=False, every=2)
    with Metrics(tmp_path, config, 1000, 4, active=True) as report:
        # The first step of this process is slow; the others take 10 s, with 5 s of evaluation.
        for step, seconds in ((5, 60), (6, 10), (7, 10), (8, 10)):
            clock.now += seconds
            report.train_step(
                step, loss=1.25, lr=1e-4, grad_norm=0.5, num_tokens=20_000, use_of_slots={}
            )
            if step == 6:
                clock.now += 5
                report.restart_clock()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "step 6/1000: loss 1.2500  lr 1.00e-04  |grad| 0.500  2,000 tokens/s  1.50 GiB"
        # 994 steps of 10 s.
        "  2:45:40 left"
    )
    # 35 s for three steps, saves and evaluations included: 992 of 35/3 s.
    assert said[1].endswith("3:12:53 left")
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [6, 8]
    assert rows[1]["memory_gib"] == 1.5 and rows[1]["tokens_per_second"] == 2000


def test_time_left_at_the_first_step_is_at_its_own_pace(tmp_path: Path) -> None:
    report = Metrics(tmp_path, LogConfig(tensorboard=False), 11, 0, active=False)
    assert report._seconds_left(1, now=50.0, seconds=30.0) == 300
    # From then on the first step no longer counts.
    assert report._seconds_left(2, now=52.0, seconds=2.0) == 18


def test_memory_without_a_gpu_is_that_of_the_process() -> None:
    """Importing torch takes more than 100 MiB, and this machine has less than a TiB."""
    assert 100 * 2**20 < metrics.peak_memory_bytes() < 2**40
    assert metrics.as_clock(3723.4) == "1:02:03"


def test_answers_in_the_log_and_in_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several lines are one in the log, and stay several in the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    answer = ShownAnswer("Count:\none, two", "three", "four\nfive", [7, 8], False)
    with Metrics(tmp_path, LogConfig(progress=False), 9, 0, active=True) as report:
        report.answers(4, [answer])
    assert "answer 1 at step 4: Count: one, two -> four five\n" in capsys.readouterr().out
    [record] = read_jsonl(tmp_path / "answers.jsonl")
    assert record == {"step": 4, "answers": [asdict(answer)]}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [event] = events.Tensors("answer 1/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 4
    # Indented, so that nothing in it is read as Markdown.
    assert text.splitlines() == [
        "    asked:    Count:", "    one, two", "    expected: three", "    answer:   four",
        "    five",
    ]  # fmt: skip
