"""Run ``gpu_all.sh`` at tiny sizes on a CPU: its programs, and the summary of what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_steps import named

ROOT = Path(__file__).parents[1]
FIRST = ("anchors", "kernels", "coded", "model")
"""What no other test runs as a program."""
STEPS = (*FIRST, "tune", "kernels-tuned", "peers", "shared", "long")
"""About 170 s of processor time, most of it imports. The others are tested where they are:
tests/gpu/test_step_on_gpu.py on a CPU, calibration and layouts in tests/bench; without names the
script's dry run takes them too."""


def dry_run(out: Path, *words: str) -> subprocess.CompletedProcess:
    """Run the script as from a shell, with this interpreter."""
    # These tests interpret Triton in their own process; the script decides that itself.
    environment = {**os.environ, "PYTHON": sys.executable}
    for name in ("TRITON_INTERPRET", "MEGALORA_TEST_GPU"):
        environment.pop(name, None)
    script = str(ROOT / "benchmarks/gpu_all.sh")
    # An hour is far more than it takes.
    command = ["bash", script, "--dry", "--seconds", "3600", "--out", str(out), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(FIRST, marks=pytest.mark.slow, id="first"),
        pytest.param(STEPS, marks=pytest.mark.long, id="all"),
    ],
)
def test_every_step_runs_and_a_second_call_has_nothing_to_do(tmp_path, chosen):
    done = dry_run(tmp_path, *chosen)
    steps = named(chosen)
    outcomes = json.loads((tmp_path / "gpu_all.json").read_text())["steps"]
    # Of a step that failed, the end of its log is what one wants to read.
    logs = {}
    for step in steps:
        if outcomes[step.name]["result"] != "ok":
            log = (tmp_path / step.result).with_suffix(".txt")
            logs[step.name] = log.read_text()[-2000:]
    assert not logs, logs
    assert done.returncode == 0, done.stdout + done.stderr
    for step in steps:
        assert json.loads((tmp_path / step.result).read_text()), step.name
    assert "a dry run: times, ratios and errors mean nothing" in done.stdout
    for step in steps:
        assert f"step: {step.name} " in done.stdout

    def times() -> list[int]:
        """When each step's result was written last."""
        return [(tmp_path / step.result).stat().st_mtime_ns for step in steps]

    before = times()
    again = dry_run(tmp_path, *chosen)
    names = ", ".join(step.name for step in steps)
    assert again.returncode == 0 and f"done before: {names}\n" in again.stdout
    # The head of every step that is begun.
    assert "==" not in again.stdout
    assert times() == before
