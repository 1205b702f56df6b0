"""The driver of a benchmark: it survives what its runs do, and leaves no process behind."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalora.bench import launch, runs
from megalora.bench.launch import Nodes, command, processes_of, run_to_log
from megalora.bench.rows import BenchOptions, Measured, Row, load_rows
from megalora.bench.runs import parse_layout, run_layouts
from megalora.config import RunConfig
from megalora.config.file import save_config
from tests.bench.made_up_rows import MEASURED, predicted
from tests.parity.runs import make_config
from tests.waiting import time_is_up_when

# What runs in the place of a rank. A layout's micro batch size says what it does: 1 succeeds, 2
# raises, 4 is killed as by a machine without memory, 8 hangs.
STAND_IN = f"""
import json, os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
for argument in sys.argv:
    if argument.startswith("--row="):
        row = Path(argument.removeprefix("--row="))
    if argument.startswith("train.micro_batch_size="):
        micro = argument[-1]
(row.parent.parent / f"started-{{micro}}-{{rank}}-{{time.time_ns()}}").touch()
# Neither rank goes on before both have started: torchrun ends a rank that is still starting as
# soon as the other has failed.
this_run = os.environ["MEGALORA_BENCH_RUN"]
(row.parent.parent / f"run-{{this_run}}-{{rank}}").touch()
while len(list(row.parent.parent.glob(f"run-{{this_run}}-*"))) < 2:
    time.sleep(0.02)
if micro == "1" and rank == "0":
    row.parent.mkdir(exist_ok=True)
    row.write_text({json.dumps(MEASURED)!r})
if micro == "2" and rank == "1":
    raise KeyError("a seeded mistake")
if micro == "4" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if micro == "8":
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def same_code(monkeypatch) -> None:
    """The driver measures anew where the code has changed: a commit, or an edit, while these tests
    run must not count."""
    monkeypatch.setattr(runs, "versions", lambda: {"commit": "0123456"})


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    """Ranks that take no time to start, and do what the driver must survive."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(launch, "MODULE", "stand_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def bench(config: RunConfig, tmp_path: Path, micros: list[int], **how: Any) -> list[Row]:
    """Rows of layouts with two ranks that differ in their micro batch size alone."""
    save_config(config, tmp_path / "config.yaml")
    layouts = [parse_layout(f"ep=2,micro={micro}", 2, config) for micro in micros]
    how = {"say": lambda line: None, **how}
    return run_layouts(
        tmp_path / "config.yaml",
        [],
        layouts,
        num_ranks=2,
        out=tmp_path / "out",
        predict=predicted,
        **how,
    )


def statuses(rows: list[Row]) -> list[str]:
    return [row.status for row in rows]


def ranks_started(out: Path) -> Counter[str]:
    """How many ranks have started, by micro batch size: files ``started-MICRO-RANK-TIME``."""
    count: Counter[str] = Counter()
    for path in out.glob("started-*"):
        _, micro, _, _ = path.name.split("-")
        count[micro] += 1
    return count


@pytest.mark.slow
def test_a_run_that_fails_costs_its_row_alone(stand_in, tiny, chats, tmp_path) -> None:
    config = make_config(tiny, chats, tmp_path, {}, global_batch_size=16)
    out = tmp_path / "out"
    # The stand-in raises at 2, is killed at 4, succeeds at 1; 16 is refused before it starts.
    rows = bench(config, tmp_path, [2, 4, 1, 16])
    assert statuses(rows) == [
        "failed: KeyError: 'a seeded mistake'",
        "out of memory",
        "ok",
        (
            "refused: train.global_batch_size=16 cannot be divided: micro_batch_size=16 * data"
            " parallel=2 = 32, and 16 is not a multiple of 32. Change train.global_batch_size or"
            " train.micro_batch_size."
        ),
    ]
    # The rows that failed lie before the one that did not.
    assert rows[2].measured == Measured(**MEASURED)  # type: ignore[arg-type]
    assert rows[2].predicted == predicted(config, 2)
    assert "a seeded mistake" in (out / rows[0].log).read_text()
    # A refused layout has started no rank, so there is no log to read.
    assert not rows[3].log and rows[3].predicted is None
    assert load_rows(out / "results.json") == rows
    # Two ranks each; none for 16.
    assert ranks_started(out) == {"2": 2, "4": 2, "1": 2}
    said: list[str] = []
    again = bench(config, tmp_path, [1, 2], say=said.append)
    assert statuses(again) == ["ok", "failed: KeyError: 'a seeded mistake'"]
    assert "measured before" in said[0]
    assert ranks_started(out) == {"2": 4, "4": 2, "1": 2}, (
        "what is ok is not run again, what failed is"
    )
    # The file keeps the rows of the first call that the second did not ask for.
    assert set(statuses(load_rows(out / "results.json"))) == set(statuses(rows))
    other = replace(config, train=replace(config.train, lr=3e-3))
    assert bench(other, tmp_path, [16])[0].key != rows[3].key, (
        "another config is another measurement"
    )


LIMIT_S = 7777
"""Time limit that tests give a run; no test waits that long, because ``time_is_up_when`` ends the
wait for exactly this number."""


def test_a_run_that_hangs_is_ended_with_all_its_ranks(
    stand_in, tiny, chats, tmp_path, monkeypatch
) -> None:
    # A token that the test knows, to look for processes by.
    token = f"token-{tmp_path.name}"
    monkeypatch.setattr(launch.uuid, "uuid4", lambda: SimpleNamespace(hex=token))
    # Not before both ranks hang: a driver that ends torchrun alone would leave them.
    out = tmp_path / "out"
    time_is_up_when(monkeypatch, lambda: ranks_started(out)["8"] == 2, LIMIT_S)
    config = make_config(tiny, chats, tmp_path, {}, global_batch_size=16)
    [row] = bench(config, tmp_path, [8], timeout_s=LIMIT_S)
    assert row.status == "timed out" and row.measured is None
    assert processes_of(token) == []


def test_a_process_that_left_its_group_is_ended_too(tmp_path, monkeypatch) -> None:
    # The child ignores SIGTERM and has a session of its own, as a rank of torchrun has: neither
    # signal to the parent's group reaches it. It is found by TOKEN in its environment.
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child',"
        " flush=True); time.sleep(600)"
    )
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}],"
        " start_new_session=True).wait()"
    )
    log = tmp_path / "log"
    time_is_up_when(monkeypatch, lambda: log.read_text() == "child\n", LIMIT_S)
    code = run_to_log(
        [sys.executable, "-c", parent], {launch.TOKEN: "left-its-group"}, log, timeout_s=LIMIT_S
    )
    assert code is None
    assert log.read_text() == "child\n" and processes_of("left-its-group") == []


def test_several_nodes(monkeypatch) -> None:
    # One node needs no number.
    assert Nodes.of({}) == Nodes(1, 0) == Nodes.of({"NNODES": "1"})
    assert Nodes.of({"NNODES": "4", "NODE_RANK": "3"}) == Nodes(4, 3) and not Nodes(4, 3).writes
    for mistaken in (
        # Both nodes would take themselves for node 0.
        {"NNODES": "2"},
        # Numbers go from 0 to 1.
        {"NNODES": "2", "NODE_RANK": "2"},
        {"NNODES": "two", "NODE_RANK": "0"},
    ):
        with pytest.raises(ValueError, match=r"NNODES|NODE_RANK"):
            Nodes.of(mistaken)
    monkeypatch.setenv("RDZV_ID", "job7")
    words, environment = command(Nodes(2, 1), 16, ["c.yaml", "--row=r"], "tp1")
    assert words == ["bash", str(launch.SCRIPT), "c.yaml", "--row=r"] and launch.SCRIPT.is_file()
    assert environment["MODULE"] == "megalora.bench.measure"
    # A rendezvous of its own for each layout, so that late ranks of the last one find no peer.
    assert environment["RDZV_ID"] == "job7-tp1"
    # 16 ranks on two nodes.
    assert environment["NPROC_PER_NODE"] == "8"
    with pytest.raises(ValueError, match="9 ranks cannot be shared out evenly over NNODES=2"):
        command(Nodes(2, 0), 9, [], "")


@pytest.mark.long
def test_for_real(tiny, chats, tmp_path) -> None:
    """One layout in processes of its own and one that is refused, then both again."""
    config = make_config(tiny, chats, tmp_path, {})
    config = replace(config, data=replace(config.data, max_length=41))
    options = BenchOptions(steps=1, routing="natural")
    ok, refused = bench(config, tmp_path, [2, 16], options=options)
    assert ok.status == "ok", (tmp_path / "out" / ok.log).read_text()
    assert refused.status.startswith("refused: ")
    assert ok.measured and ok.measured.weights == "real" and ok.measured.tokens == str(chats)
    assert ok.measured.imbalance and ok.measured.imbalance > 1 and len(ok.measured.peak_bytes) == 2
    # The second call must not measure again: the file of the one measurement stays as it is.
    [written] = (tmp_path / "out" / "measured").glob("*.json")
    first_time = written.stat().st_mtime_ns
    assert bench(config, tmp_path, [2, 16], options=options)[0] == ok
    assert list(written.parent.glob("*.json")) == [written]
    assert written.stat().st_mtime_ns == first_time
