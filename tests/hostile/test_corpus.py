"""Every input that fuzzing has found, and whole ones beside them: taken, or refused in a line."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.chaos import fuzz
from benchmarks.chaos.fault import LOST, REFUSED
from benchmarks.chaos.fuzz_targets import CORPUS, TARGETS, fault_of

INPUTS = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def name_of(path: Path) -> str:
    return path.relative_to(CORPUS).as_posix()


def test_each_target_has_a_whole_input(tmp_path: Path) -> None:
    """Or fuzzing would try the beginnings of readers alone."""
    assert {path.parent.name for path in INPUTS} == TARGETS.keys()
    for target, read in TARGETS.items():
        wholes = [path for path in INPUTS if path.parent.name == target and "whole" in path.name]
        assert wholes
        for whole in wholes:
            folder = tmp_path / name_of(whole)
            folder.mkdir(parents=True)
            read(whole.read_bytes(), folder)
    # Small enough to be kept beside the code.
    assert sum(path.stat().st_size for path in INPUTS) < 500_000


@pytest.mark.parametrize("path", INPUTS, ids=name_of)
def test_what_was_found(path: Path, tmp_path: Path) -> None:
    assert fault_of(path.parent.name, path.read_bytes(), tmp_path) is None


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(INPUTS), st.randoms(use_true_random=False))
def test_changes_of_what_was_found(
    tmp_path_factory: pytest.TempPathFactory, path: Path, chance: random.Random
) -> None:
    """As fuzzing changes them without atheris."""
    folder = tmp_path_factory.getbasetemp() / f"changed_{path.parent.name}"
    folder.mkdir(exist_ok=True)
    assert fault_of(path.parent.name, fuzz._mutated(path.read_bytes(), chance), folder) is None


def test_what_is_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the corpus: here a reader that fails at a text of five letters."""

    def read(data: bytes, folder: Path) -> None:
        if b"aaaaa" in data:
            raise KeyError("a bug")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        target, seconds, corpus, out = command[-4:]
        fuzz.run_target(target, float(seconds), Path(corpus), Path(out))
        return subprocess.CompletedProcess(command, 0, b"", b"")

    corpus = tmp_path / "corpus/json"
    corpus.mkdir(parents=True)
    (corpus / "whole").write_text('{"a": "F8"}')
    monkeypatch.setitem(TARGETS, "json", read)
    monkeypatch.setattr(subprocess, "run", run)
    # Where atheris is installed it would end this process.
    monkeypatch.setitem(sys.modules, "atheris", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found, done = fuzz.fuzzed(corpus.parent, tmp_path / "scratch", 0.5)
    assert found.result == LOST and found.detail == "KeyError: 'a bug'"
    assert done.result == REFUSED and "inputs" in done.what
    (kept,) = corpus.glob("found_*")
    assert b"aaaaa" in kept.read_bytes()
    assert fault_of("json", kept.read_bytes(), tmp_path) == found.detail
