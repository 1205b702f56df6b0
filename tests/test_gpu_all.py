"""The steps of ``gpu_all.sh``: time is shared out, a failed step is named and the others go on, a
second call continues."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_all, gpu_machine, gpu_steps, gpu_tests
from benchmarks.gpu_machine import Machine
from benchmarks.gpu_outcomes import Outcome, Record
from benchmarks.gpu_steps import BUDGET, OUT, STEPS, Step, groups, limits, named
from tests.waiting import PATIENCE_S, Clock, is_running, said_by, time_is_up_when, wait_until

ROOT = Path(__file__).parents[1]
# A program that keeps to the rules: it writes what it was told, how often it was called, and which
# cases it did not reach.
WRITES = """
import json, pathlib, sys
out, budget, *left = sys.argv[1:]
path = pathlib.Path(out)
calls = json.loads(path.read_text())["calls"] + 1 if path.is_file() else 1
path.write_text(json.dumps({"calls": calls, "budget": float(budget), "not_reached": left}))
"""


SLEEPS = f"time.sleep({PATIENCE_S})"


def step(name: str, code: str = WRITES, *words: str, share: int = 10, **how) -> Step:
    """A step whose program is ``code``."""
    command = ("-c", code, OUT, BUDGET, *words)
    return Step(name, share, f"shows {name}", f"gpu_{name}.json", command, **how)


@pytest.fixture
def machine(tmp_path) -> Machine:
    """This interpreter as a machine with a GPU, which no step here asks for."""
    results = tmp_path / "results"
    results.mkdir()
    return Machine(sys.executable, results, False, tmp_path / "site", {})


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    """Of one call; it stands still, so that shares of its time are exact."""
    return Clock(monkeypatch, gpu_all)


def run(machine: Machine, steps: list[Step], seconds: float = 10 * PATIENCE_S) -> Record:
    """One call. The steps' processes have real limits, so long that none is reached."""
    record = Record(machine.results, dry=False)
    gpu_all.run_steps(machine, record, record.still_to_do(steps), seconds, None)
    return record


def results_of(record: Record) -> dict[str, str]:
    return {name: outcome.result for name, outcome in record.outcomes.items()}


def written(machine: Machine, name: str) -> dict:
    return json.loads((machine.results / f"gpu_{name}.json").read_text())


def test_the_table_shares_out_the_time():
    usual = named([])
    # Shares are seconds of a run of nine minutes; those of the first group are one.
    at_once, *alone = groups(usual)
    assert [step.name for step in at_once] == ["tests", "shared", "packed", "cp"]
    assert {step.share for step in at_once} == {125}
    assert 125 + sum(step.share for [step] in alone) == gpu_steps.SECONDS == 540
    assert [step.name for [step] in alone][:3] == ["anchors", "peers", "model"]
    assert len({step.result for step in STEPS}) == len(STEPS)
    for step in STEPS:
        assert step.result.startswith("gpu_"), "what --archive takes"
    # Ends from the start of the call. Of two steps of 125 and 15 s alone, 280 s are 250 and 30.
    ends = limits(usual, 540)
    assert ends["tests"] == ends["cp"] == 125 and ends["calibration"] == 540
    assert limits(named(["tests", "anchors"]), 280) == {"tests": 250, "anchors": 280}
    assert groups(named(["anchors"])) == [named(["anchors"])]
    # The last three may live on what the others leave over.
    for step in usual[:-3]:
        assert step.share >= step.least_s, f"{step.name} would never be reached"
    with pytest.raises(ValueError, match="no step is called 'kernel'; there are tests, shared,"):
        named(["kernel"])


def test_what_a_step_leaves_over_goes_to_the_next(machine, clock, monkeypatch):
    """Both have half of 2000 s, and a margin in which no case is begun."""
    run_programs = Machine.run

    def run_for_three_seconds(self: Machine, *how: Any) -> Iterator[tuple[Step, Outcome]]:
        clock.now_s += 3
        return run_programs(self, *how)

    monkeypatch.setattr(Machine, "run", run_for_three_seconds)
    steps = [step("quick"), step("next", margin_s=5)]
    assert results_of(run(machine, steps, 2000.0)) == {"quick": "ok", "next": "ok"}
    # Half, less the usual margin of 8 s.
    assert written(machine, "quick")["budget"] == 1000 - 8
    # Its own half and what the first has left of its own.
    assert written(machine, "next")["budget"] == 2000 - 3 - 5


def test_checks_of_values_run_at_once(machine):
    """Each waits for a file that the other writes; the step that times something comes after both
    and finds both files."""
    meets = """
import pathlib, sys, time
out, budget, mine, other = sys.argv[1:]
pathlib.Path(mine).touch()
end = time.monotonic() + 60
while not pathlib.Path(other).exists():
    assert time.monotonic() < end, "the other one never began"
    time.sleep(0.01)
pathlib.Path(out).write_text('{"not_reached": []}')
"""
    a, b = (str(machine.results / name) for name in "ab")
    alone = f"import os, sys; assert os.path.exists({a!r}) and os.path.exists({b!r});"
    alone += "open(sys.argv[1], 'w').write('{}')"
    steps = [step("timed", alone), step("one", meets, a, b, values=True)]
    steps += [
        step("two", meets, b, a, values=True),
        step("none", modules=("no.such",), values=True),
    ]
    found = results_of(run(machine, steps))
    assert found == {"one": "ok", "two": "ok", "none": "not run", "timed": "ok"}


STUBBORN = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[3], "w").write(str(os.getpid()))
{SLEEPS}
"""


def stubborn(machine: Machine) -> tuple[list[Step], list[Path]]:
    """Three checks of values that do not end when asked, and the files with their numbers."""
    files = [machine.results / name for name in "abc"]
    steps = [step(path.name, STUBBORN, str(path), values=True) for path in files]
    return steps, files


def test_what_runs_at_once_ends_at_once(machine, monkeypatch):
    """All are asked to end before one is killed: their times to end do not add up."""
    monkeypatch.setattr(gpu_machine, "GRACE_S", 0.3)
    steps, files = stubborn(machine)
    sent = []
    killpg = os.killpg

    def recorded(group: int, number: int) -> None:
        # 0 only asks whether it lives.
        if number:
            sent.append(signal.Signals(number).name)
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", recorded)
    quick = step("quick", values=True)
    found = machine.run([*steps, quick], 2000.0)
    assert next(found)[0] is quick, "a step that has ended waits for the others"
    wait_until(lambda: all(said_by(path)() for path in files))
    found.close()
    assert sent == 3 * ["SIGTERM"] + 3 * ["SIGKILL"]
    for path in files:
        assert not is_running(int(path.read_text()))


def test_steps_that_run_at_once_have_their_own_seconds(machine):
    second = f"import time; time.sleep(1)\n{WRITES}"
    record = run(machine, [step("slow", second, values=True), step("fast", values=True)])
    assert results_of(record) == {"slow": "ok", "fast": "ok"}
    assert record.outcomes["slow"].seconds >= 1
    assert record.outcomes["fast"].seconds < record.outcomes["slow"].seconds


def test_a_check_that_ended_is_done_though_the_call_is_interrupted(machine, monkeypatch):
    steps, _ = stubborn(machine)
    monkeypatch.setattr(gpu_machine, "GRACE_S", 0.1)

    def interrupt(line: str, **how: Any) -> None:
        if "quick: ok" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu_all, "print", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(machine, [*steps, step("quick", values=True)])
    assert results_of(Record(machine.results, dry=False)) == {
        "a": "stopped", "b": "stopped", "c": "stopped", "quick": "ok",
    }  # fmt: skip


def test_failures_are_named_and_the_others_go_on(machine, capsys):
    # Ends with a code, writes nothing, writes no JSON, needs a module or a file that is not there.
    steps = [
        step("broken", "import sys; print('a reason'); sys.exit(3)"),
        step("silent", "pass"),
        step("spoilt", "import sys; open(sys.argv[1], 'w').write('{')"),
        step("absent", modules=("no.such.module",)),
        step("later", after="gpu_silent.json"),
        step("good"),
    ]
    record = run(machine, steps)
    assert results_of(record) == {
        "broken": "failed", "silent": "failed", "spoilt": "failed", "absent": "not run",
        "later": "not run",
        "good": "ok",
    }  # fmt: skip
    assert record.outcomes["broken"].why == "exit code 3; see gpu_broken.txt"
    assert "a reason" in (machine.results / "gpu_broken.txt").read_text()
    assert "no gpu_silent.json" in record.outcomes["silent"].why
    assert record.outcomes["later"].why == "gpu_silent.json is not there"
    assert "broken: failed, exit code 3" in capsys.readouterr().out


def test_a_step_beyond_its_share_is_stopped_with_all_it_started(machine, monkeypatch):
    pid = machine.results / "pid"
    code = (
        f"import subprocess; p = subprocess.Popen(['sleep', '{PATIENCE_S}']);"
        f" open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    )
    # The first of the two has a third of the time.
    time_is_up_when(monkeypatch, said_by(pid), limit_s=2000.0)
    record = run(machine, [step("endless", code, share=10), step("good", share=20)], 6000.0)
    assert results_of(record) == {"endless": "stopped", "good": "ok"}
    assert record.outcomes["endless"].why.startswith("stopped after 2000 s")
    assert not is_running(int(pid.read_text())), "what it started still runs"


def test_what_a_stopped_step_started_has_time_to_end(machine, monkeypatch):
    """As torchrun has to, which ends its ranks: the program itself is gone at once."""
    monkeypatch.setattr(gpu_machine, "GRACE_S", PATIENCE_S)
    ready = machine.results / "ready"
    ended = machine.results / "ended"
    child = machine.results / "child.py"
    child.write_text(
        "import pathlib, signal, sys, time\n"
        # Half a second, so that the program that started it is gone first.
        f"end = lambda *_: (time.sleep(0.5), pathlib.Path({str(ended)!r}).touch(), sys.exit())\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(ready)!r}).write_text('yes')\n"
        f"{SLEEPS}\n"
    )
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, {str(child)!r}]).wait()"
    time_is_up_when(monkeypatch, said_by(ready), limit_s=3000.0)
    [(_, outcome)] = machine.run([step("parent", code)], 3000.0)
    assert outcome.result == "stopped"
    assert ended.exists()


def test_one_that_does_not_end_when_asked_is_killed(machine, monkeypatch):
    # It ignores SIGTERM, so that this much is waited for it and no more.
    monkeypatch.setattr(gpu_machine, "GRACE_S", 0.3)
    ready = machine.results / "ready"
    ended = machine.results / "ended"
    code = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f" pathlib.Path({str(ready)!r}).write_text('yes');"
        f" {SLEEPS}; pathlib.Path({str(ended)!r}).touch()"
    )
    time_is_up_when(monkeypatch, said_by(ready), limit_s=3000.0)
    [(_, outcome)] = machine.run([step("deaf", code)], 3000.0)
    assert outcome.result == "stopped"
    assert not ended.exists(), "it was waited for"


def test_a_second_call_continues(machine):
    """Done steps are left alone, cut-off ones get their file back, and what failed comes last."""
    order = machine.results / "order"
    note = f"open({str(order)!r}, 'a').write(sys.argv[3] + ' ')\n"
    first = [
        step("failed", "import sys; sys.exit(1)"),
        step("done"),
        step("part", WRITES, "far"),
    ]
    assert results_of(run(machine, first)) == {"failed": "failed", "done": "ok", "part": "part"}
    # The same steps with a program that notes its name and leaves nothing.
    code = "import sys\n" + note + WRITES.replace("*left", "name").replace("left", "[]")
    mended = [step(name, code, name) for name in ("failed", "done", "part")]
    # "part" goes before what failed; "done" is not called at all.
    record = run(machine, mended)
    assert results_of(record) == {"failed": "ok", "done": "ok", "part": "ok"}
    assert order.read_text() == "part failed "
    assert written(machine, "done")["calls"] == 1 and written(machine, "part")["calls"] == 2
    assert record.outcomes["part"].calls == 2


def test_a_call_without_time_forgets_nothing(machine):
    # Of earlier calls one result is a part and one is whole; only a step that is new is not
    # reached.
    run(machine, [step("part", WRITES, "far"), step("never")])
    record = Record(machine.results, dry=False)
    gpu_all.run_steps(machine, record, [step("part"), step("other")], 0.0, None)
    assert results_of(record) == {"part": "part", "never": "ok", "other": "not reached"}


def test_a_step_is_not_begun_with_less_than_it_needs(machine):
    # Each has a half of 2,000 s; what the first does not take goes to the second.
    record = run(machine, [step("long", least_s=5000), step("short", least_s=500)], 2000.0)
    assert results_of(record) == {"long": "not reached", "short": "ok"}
    assert record.outcomes["long"].why == "1000 s were left of the 5000 that it needs"


@pytest.mark.slow
def test_what_a_killed_call_left_is_continued(machine):
    """Whatever ends the script itself: a step that was running keeps what it has written."""
    # The step writes and then kills the process that runs the steps, here one of its own.
    kill = f"{WRITES}\nimport os, signal\nos.kill(os.getppid(), signal.SIGKILL)"
    code = (
        "import pathlib, sys; from tests import test_gpu_all as t; m = t.Machine(sys.executable,"
        f" pathlib.Path({str(machine.results)!r}), False, pathlib.Path('/'), {{}}); t.run(m,"
        f" [t.step('killed', {kill!r})])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -9
    outcome = Record(machine.results, dry=False).outcomes["killed"]
    assert outcome.why == "the call was ended while it ran"
    assert results_of(run(machine, [step("killed")])) == {"killed": "ok"}
    assert written(machine, "killed")["calls"] == 2


def test_results_of_another_run_are_no_results_of_this(machine):
    """A JSON that was committed does not make a step that writes none look done."""
    (machine.results / "gpu_silent.json").write_text("{}")
    assert results_of(run(machine, [step("silent", "pass")])) == {"silent": "failed"}


def test_records_of_another_kind_or_day(machine, capsys):
    record = Record(machine.results, dry=True)
    record.put("tests", Outcome("ok"))
    with pytest.raises(ValueError, match="results of a dry run; choose another folder with --out"):
        Record(machine.results, dry=False)
    # Clocks, drivers and neighbours of another day are not those of today.
    record.begun = datetime.now(UTC) - timedelta(days=1)
    record.put("tests", Outcome("ok"))
    assert not Record(machine.results, dry=False).outcomes
    assert "beginning anew" in capsys.readouterr().out
    for content in ("{", "[]", '{"dry": false, "steps": {}}'):
        record.path.write_text(content)
        with pytest.raises(ValueError, match="not a record of earlier calls"):
            Record(machine.results, dry=False)


def test_variables_of_a_step(machine, monkeypatch):
    # A user's own settings would change what is measured.
    monkeypatch.setenv("MEGALORA_BACKEND", "loop")
    monkeypatch.setenv("MEGALORA_TUNED", "mine.json")
    [kernels] = named(["kernels"])
    [model] = named(["model"])
    # The arms of kernels are compared without a table, the model is trained with it.
    untuned = machine.environment_of(kernels)
    assert untuned["MEGALORA_TUNED"] == "off" and "MEGALORA_BACKEND" not in untuned
    assert "MEGALORA_TUNED" not in machine.environment_of(model), "there is no table yet"
    table = machine.results / "gpu_tuned.json"
    table.write_text("{}")
    assert machine.environment_of(model)["MEGALORA_TUNED"] == str(table)
    dry = Machine(machine.python, machine.results, True, machine.site, {}).environment_of(STEPS[0])
    assert dry["TRITON_INTERPRET"] == "1" and dry["CUDA_VISIBLE_DEVICES"] == ""
    assert "TRITON_INTERPRET" not in untuned


def test_empty_variables_are_none(monkeypatch):
    for name in ("OUT", "TOTAL_SECONDS", "DRY"):
        monkeypatch.setenv(name, "")
    args = gpu_all.arguments([])
    assert args.out is None and args.seconds == gpu_steps.SECONDS and not args.dry


def test_a_dry_run_says_where_kernels_cannot_be_interpreted(capsys):
    # On a GPU nothing is interpreted, and with an interpreter there is nothing to say.
    found = {"torch": True, "triton": True, "gpu": True}
    gpu_machine.check_machine({**found, "interpreter": False}, "python", dry=False)
    gpu_machine.check_machine({**found, "interpreter": True}, "python", dry=True)
    assert capsys.readouterr().err == ""
    gpu_machine.check_machine({**found, "interpreter": False}, "python", dry=True)
    assert "Triton before 3.7 cannot interpret kernels with NumPy 2.4" in capsys.readouterr().err


def report(test: str, outcome: str, when: str = "call", why: str = "") -> Any:
    """A report as pytest makes one for each phase of a test."""
    skipped = outcome == "skipped"
    longrepr = ("file", 1, f"Skipped: {why}") if skipped else why
    return SimpleNamespace(
        nodeid=test, when=when, outcome=outcome, skipped=skipped, failed=outcome == "failed",
        longrepr=longrepr,
        longreprtext=why, duration=1.0,
    )  # fmt: skip


def test_the_tests_step_writes_every_test_and_leaves_out_what_passed(tmp_path, monkeypatch):
    """Also for processes of pytest-xdist, which see the environment alone."""
    out = tmp_path / "gpu_tests.json"
    results = gpu_tests.Results(out, torch.device("cpu"), {})
    results.pytest_runtest_logreport(report("a", "passed", "setup"))
    assert not out.exists(), "a test is not over when its fixtures are made"
    results.pytest_runtest_logreport(report("a", "passed"))
    results.pytest_runtest_logreport(report("b", "failed", why="Traceback\nE  assert 1 == 2"))
    results.pytest_runtest_logreport(report("c", "failed", "setup", why="no fixture"))
    results.pytest_runtest_logreport(report("d", "skipped", "setup", why="needs two GPUs"))
    results.pytest_runtest_logreport(report("e", "skipped", "setup", why=gpu_tests.OUT_OF_TIME))
    record = json.loads(out.read_text())
    outcomes = {row["test"]: row["outcome"] for row in record["rows"]}
    assert outcomes == {"a": "passed", "b": "failed", "c": "failed", "d": "skipped"}
    # Of a traceback the line that says what was wrong.
    assert record["failures"] == ["b: E  assert 1 == 2", "c: no fixture"]
    assert record["not_reached"] == ["e"]
    # A second call leaves out what passed, and tries again what failed or was not reached.
    second = gpu_tests.Results(out, torch.device("cpu"), {})
    assert second.passed == ["a"]
    monkeypatch.setenv(gpu_tests.PASSED, json.dumps(second.passed))
    a, b, e = [SimpleNamespace(nodeid=name) for name in "abe"]
    items: Any = [a, b, e]
    left_out: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    gpu_tests.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)  # type: ignore[arg-type]
    assert items == [b, e]
    assert left_out == [a]
    # Before its deadline a test is begun, after it skipped.
    monkeypatch.setenv(gpu_tests.DEADLINE, str(time.time() + PATIENCE_S))
    gpu_tests.pytest_runtest_setup(items[0])
    monkeypatch.setenv(gpu_tests.DEADLINE, str(time.time() - 1))
    with pytest.raises(pytest.skip.Exception):
        gpu_tests.pytest_runtest_setup(items[0])
