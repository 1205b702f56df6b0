"""The processes of the sweep: compilers that may abort, and the command that starts the sweep
again."""

import json
import os
import selectors
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megalora_kernels.tuned_table import MEASURED

from benchmarks import tune, tune_compile
from benchmarks.tune_compile import Job, compile_all
from tests.made_up_sweep import GATE_UP, OTHERS, RULE
from tests.waiting import time_is_up_when

ROOT = Path(__file__).parents[1]


# A compiler that does what the name of a job says.
CHILD = """
import os, sys
for line in sys.stdin:
    if "abort" in line:
        print("LLVM ERROR: nothing", file=sys.stderr, flush=True)
        print("stack 1", file=sys.stderr, flush=True)
        os.abort()
    if "exit" in line:
        sys.exit("no module named triton")
    if "sleep" in line:
        import time
        time.sleep(60)
    print("TypeError: no" if "wrong" in line else "ok", flush=True)
"""


def job(word: str, number: int = 0) -> Job:
    return Job(replace(GATE_UP, name=f"{word} {number}"), 2, RULE)


def test_an_abort_loses_one_variant_and_not_the_sweep(monkeypatch):
    class Selector(selectors.DefaultSelector):
        """Time is up for the job that sleeps, as soon as it is asked for; the others take as long
        as they take."""

        def select(self, timeout: float | None = None) -> list[Any]:
            assert timeout == 3
            return super().select(0 if job_of_thread.sleeps else None)

    job_of_thread = threading.local()
    ask = tune_compile._Child.ask

    def noted(self: Any, line: str, seconds: float) -> str:
        job_of_thread.sleeps = "sleep" in line
        return ask(self, line, seconds)

    monkeypatch.setattr(tune_compile._Child, "ask", noted)
    monkeypatch.setattr(tune_compile.selectors, "DefaultSelector", Selector)
    # More good jobs than processes, so that some come after each kind of trouble.
    good = [job("good", i) for i in range(5)]
    jobs = [good[0], job("abort"), good[1], job("wrong"), job("exit"), *good[2:], job("sleep")]
    found = compile_all(
        jobs, [sys.executable, "-c", CHILD], num_processes=2, seconds=3600, job_seconds=3
    )
    for done in good:
        assert found[done] is None
    assert found[job("wrong")] == "TypeError: no"
    # The first line that the process wrote, not its stack; signals are negative exit codes.
    assert found[job("abort")] == "the compiler's process ended with -6: LLVM ERROR: nothing"
    assert found[job("exit")] == "the compiler's process ended with 1: no module named triton"
    why = found[job("sleep")] or ""
    assert why.startswith("not compiled after 3 s; the compiler's process ended with -9")


def test_a_job_that_the_end_cuts_off_is_not_refused(monkeypatch):
    """It had less than a compiler may take."""

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> list[Any]:
            assert timeout is not None and timeout < tune_compile.JOB_SECONDS
            # Time is up at once.
            return super().select(0)

    monkeypatch.setattr(tune_compile.selectors, "DefaultSelector", Selector)
    # Absent from what was found: neither compiled nor refused, so that another call tries it again.
    slow = [job("sleep")]
    assert compile_all(slow, [sys.executable, "-c", CHILD], 1, seconds=30) == {}


def test_no_job_is_begun_when_time_is_over():
    assert compile_all([job("good")], [sys.executable, "-c", CHILD], 2, seconds=0) == {}


def test_a_job_survives_the_pipe():
    sent = Job(GATE_UP, 16, replace(OTHERS[-1], persistent=True), "float16")
    assert Job.read(sent.line()) == sent


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m benchmarks.tune`` in a process of its own."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    env |= environment
    # These tests interpret Triton in their own process; the command decides that itself.
    env.pop("TRITON_INTERPRET", None)
    call = [sys.executable, "-m", "benchmarks.tune", *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_dry_run_goes_the_whole_way(tmp_path):
    out = tmp_path / "new" / "dry.json"
    done = command("--budget-seconds", 240, "--out", out, "--dry")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    sweep = found["sweep"]
    # What ``tune_points.dry_groups`` has.
    assert len(sweep["points"]) == 3 and len(sweep["crossing"]) == 1
    assert not sweep["not_reached"]
    assert not sweep["refused"], sweep["refused"]
    for point in sweep["points"].values():
        assert len(point["first_us"]) == 3 and min(point["first_us"].values()) > 0
    assert not next(iter(sweep["crossing"].values()))["problems"]
    assert "times mean nothing" in found["measured"]["clocks"]
    assert "times mean nothing" in done.stdout
    # The fields without which the kernels refuse a table.
    assert set(found["measured"]) == set(MEASURED) and found["measured"]["triton"]
    # A second call has nothing to do: every time is the same number.
    again = command("--budget-seconds", 60, "--out", out, "--dry")
    assert again.returncode == 0
    assert json.loads(out.read_text())["sweep"]["points"] == sweep["points"]


def test_mistakes_on_the_command_line(tmp_path):
    (tmp_path / "other.json").write_text('{"benchmark": "parity"}')
    (tmp_path / "text.json").write_text("{")
    nothing = ["--budget-seconds", 0, "--out", tmp_path / "a.json"]
    for arguments, message in (
        (nothing, "--budget-seconds 0.0: want a positive number of seconds"),
        (["--out", tmp_path], "is a folder; name a file"),
        (
            ["--out", tmp_path / "other.json"],
            "exists and is not a result of this script; give another, or remove it",
        ),
        (["--out", tmp_path / "text.json"], "exists and is not JSON"),
        ([], "the following arguments are required: --out"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def sweep_by(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> tuple[int, int]:
    """(exit code, processes started) where each process of the sweep is a shell script."""
    program = folder / "python"
    program.write_text(
        f"#!/bin/sh\necho started >> {folder}/calls\nn=$(wc -l < {folder}/calls)\n{script}\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(tune.sys, "executable", str(program))
    code = tune.sweep(seconds, folder / "out.json", dry=False)
    return code, len((folder / "calls").read_text().splitlines())


@pytest.mark.parametrize(
    ("script", "code", "calls"),
    [
        # Done, failed, and a mistake of the user: none is tried again.
        ("exit 0", 0, 1),
        ("exit 1", 1, 1),
        ("exit 2", 2, 1),
        # A dead device, a hanging variant, an abort, and then the end.
        (
            '[ "$n" = 1 ] && exit 75; [ "$n" = 2 ] && exit 76; [ "$n" = 3 ] && kill -6 $$; exit 0',
            0,
            4,
        ),
    ],
)
def test_a_sweep_that_a_variant_ends_is_started_again(script, code, calls, tmp_path, monkeypatch):
    assert sweep_by(script, tmp_path, monkeypatch, seconds=100) == (code, calls)


def test_a_sweep_is_ended_when_its_budget_is_spent(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        time_is_up_when(patch, (tmp_path / "calls").is_file)
        # 1, for nothing was written; had it been left to sleep, it would have ended with 0.
        assert sweep_by("exec sleep 120", tmp_path, monkeypatch, seconds=1000) == (1, 1)
    # With so little left it is not started again: this call has added one line to the first's.
    little = tune.LEAST_SECONDS - 1
    assert sweep_by("exit 75", tmp_path, monkeypatch, seconds=little)[1] == 2
