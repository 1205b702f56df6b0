"""Checks of long rows on a GPU, here on a CPU: that each fails where it should, and what becomes of
their rows. All of them run at tiny sizes in tests/test_gpu_dry.py."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_lines, gpu_long, long_attention, long_loss, long_training
from benchmarks.long_training import MULTIPLE, compare, packed, padded, waits_of
from megalora.model.attention import attend_reference
from tests.waiting import PATIENCE_S

CPU = torch.device("cpu")
HEADS = long_attention.DRY


def test_attention_that_sees_other_documents_is_refused():
    right = long_attention.check(CPU, HEADS)
    assert right["status"] == "ok"
    # The reference in bfloat16 errs by some roundings of 4e-3, and not by nothing.
    assert 1e-4 < min(right["errors"].values()) < 1e-2
    assert "window_size" in right["options"] and right["line"].endswith("flash attention)")

    def one_document(q, k, v, chunk, scale):
        ends = {"query_ends": (0, len(q)), "key_ends": (0, len(k))}
        return attend_reference(q, k, v, replace(chunk, **ends), scale)

    wrong = long_attention.check(CPU, HEADS, one_document)
    for name in ("out", "dq", "dk", "dv"):
        assert f"{name} " in wrong["status"]


def test_some_chunks_of_the_checked_row_have_more_keys_than_queries():
    """Else the alignment of the last query with the last key would go unseen."""
    more = []
    for chunk in long_attention.chunks_of_row((0, 16, 20, 45, 63, 64)):
        more.append(chunk.query_ends != chunk.key_ends)
    # The chunks begin at 0, 16, 32 and 48; documents at 0 and 16 begin with one.
    assert more == [False, False, True, True]


@pytest.mark.parametrize("mix", long_attention.MEANS)
def test_lengths_fill_a_row_and_have_their_mean(mix):
    lengths = long_attention.lengths_of(mix, 2**18)
    assert sum(lengths) == 2**18 and min(lengths) > 0
    mean = long_attention.MEANS[mix][0]
    # 260 documents and more, whose lengths vary by a factor of e^1.2.
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.2)
    assert lengths == long_attention.lengths_of(mix, 2**18)


def test_compilations_are_counted(monkeypatch):
    monkeypatch.setattr(long_attention, "SLOW_MS", 5.0)
    seen = set()

    def call(key: int) -> None:
        if key not in seen:
            time.sleep(0.02)
        seen.add(key)

    calls = iter([lambda: call(0), lambda: call(1), lambda: call(0), lambda: call(2)])
    assert long_attention.compilations(calls, CPU) == 3


def test_rows_hold_the_same_tokens_packed_and_padded():
    setup = long_training.small(CPU, dry=True)
    of = long_training.samples(setup, long_training.DRY_LENGTHS)
    [row] = packed(of)
    rows = padded(of)
    assert len(rows) == len(of) and len({len(one.tokens) for one in rows}) == 1
    assert len(row.tokens) % MULTIPLE == len(rows[0].tokens) % MULTIPLE == 0
    labels = torch.cat([one.labels[one.loss_mask > 0] for one in rows])
    assert torch.equal(row.labels[row.loss_mask > 0], labels)


def test_two_trainings_are_compared_by_loss_and_all_gradients():
    want = {"loss": torch.tensor(2.0), "a": torch.ones(4), "b": torch.ones(4, 3)}
    status, _, values = compare(want, want)
    assert status == "ok" and values == {"loss": 0.0, "gradient": 0.0}
    # One of sixteen entries by 0.4: 0.1 of the norm.
    off = want | {"a": torch.tensor([1.4, 1, 1, 1])}
    assert compare(off, want)[0] == "FAILED: gradients 1.0e-01 > 5e-02"
    assert compare(want | {"loss": torch.tensor(2.02)}, want)[0] == "FAILED: loss 1.0e-02 > 5e-03"
    assert "gradients nan" in compare(want | {"a": torch.full((4,), torch.nan)}, want)[0]
    with pytest.raises(ValueError, match="gradients of 1 and of 2 tensors"):
        compare({"loss": want["loss"], "a": want["a"]}, want)


def test_waits_are_calls_that_synchronize_and_copies_to_the_host():
    profile = {
        "waits": {"cudaStreamSynchronize": {"count": 2.0}},
        "copies": {"Memcpy DtoH (Device -> Pageable)": {"count": 1.0},
                   "Memcpy HtoD (Pinned -> Device)": {"count": 1.0}},
    }  # fmt: skip
    found = waits_of(profile)
    assert found == ["2 cudaStreamSynchronize", "1 Memcpy DtoH (Device -> Pageable)"]
    with pytest.raises(RuntimeError, match="no profile: no library"):
        waits_of({"problem": "no library"})


def test_the_loss_is_judged_by_values_and_peak():
    sizes = long_loss.Sizes()
    chunk = sizes.chunks[0]
    # 256 MiB of logits, and twice 32,768 x 2,048 elements of 2 bytes: 512 MiB.
    formula = 512 * long_loss.MIB
    taken = {chunk: 1.0}
    assert long_loss.judged(sizes, 0.0, 0.0, {chunk: formula}, taken)["status"] == "ok"
    assert long_loss.judged(sizes, 0.0, 0.0, {chunk: None}, taken)["status"] == "ok"
    peak = {chunk: 2 * formula}
    status = long_loss.judged(sizes, 0.0, float("nan"), peak, taken)["status"]
    assert status == "FAILED: dx nan > 1e-02, peak 1024 MiB > 1.25 x 512 MiB"


@pytest.fixture
def ran(monkeypatch):
    """Names of the checks that were run, none of them in earnest; "cp" fails."""
    names = []

    def run_apart(check, limit_s, dry):
        names.append(check.name)
        status = "FAILED: x" if check.name == "cp" else "ok"
        return {"check": check.name, "status": status, "line": "-", "seconds": limit_s}

    monkeypatch.setattr(gpu_long, "run_apart", run_apart)
    return names


def test_a_failed_check_stops_no_other_and_is_run_again(tmp_path, ran, capsys):
    out = tmp_path / "gpu_long.json"
    assert gpu_long.main(["--dry", "--out", str(out)]) == 1
    assert ran == [check.name for check in gpu_long.CHECKS]
    assert "cp: FAILED: x: -" in capsys.readouterr().out
    record = json.loads(out.read_text())
    verdicts = {line.what: line.verdict for line in gpu_lines.of_long(record)}
    assert verdicts["long: cp"] == "FAILED" and verdicts["long: memory"] == "ok"
    ran.clear()
    assert gpu_long.main(["--dry", "--out", str(out)]) == 1 and ran == ["cp"]
    ran.clear()
    named = ["--only", "memory", "speed"]
    assert gpu_long.main(["--dry", "--out", str(tmp_path / "two.json"), *named]) == 0
    assert ran == ["speed", "memory"]


def test_what_there_is_no_time_for_is_named(tmp_path, ran):
    out = tmp_path / "gpu_long.json"
    args = argparse.Namespace(dry=True, budget_seconds=0.0, out=out, only=None)
    assert gpu_long.run(CPU, args) == 0 and not ran
    assert json.loads(out.read_text())["not_reached"] == gpu_long.NAMES
    args.only = ["cp", "loss"]
    assert gpu_long.run(CPU, args) == 0
    # In the order of the checks; the others were not asked for.
    assert json.loads(out.read_text())["not_reached"] == ["loss", "cp"]
    # Twice its share, and never more than is left.
    first, last = gpu_long.CHECKS[0], gpu_long.CHECKS[-1]
    assert gpu_long.limit_of(first, gpu_long.CHECKS, 100.0) == pytest.approx(20.0)
    assert gpu_long.limit_of(last, [last], 7.0) == 7.0


def test_an_error_and_a_hang_are_rows(capsys):
    def broken(device, dry):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    row = gpu_long.run_here(gpu_long.Check("x", 1, broken), CPU, True)
    assert row["status"] == "FAILED: RuntimeError: CUDA error: an illegal memory access"
    assert "Traceback" in capsys.readouterr().err
    hangs = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({PATIENCE_S})"])
    assert gpu_long.wait_or_end(hangs, 0.01) is None and hangs.returncode == -15
