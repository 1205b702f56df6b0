"""Check the list of a checkpoint's digests against coreutils' sha256sum, and what is said of a file
or a list that is not what was written."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megalora.adapters.sums import SUMS, check_sums, write_sums

NEEDED = [Path("adapter_config.json"), Path("training_state/state.json")]
OF_A_RANK = "training_state/rank_00000.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_000001"
    (folder / "training_state").mkdir(parents=True)
    for number, path in enumerate((*NEEDED, Path(OF_A_RANK), Path("probe.json"))):
        (folder / path).write_bytes(bytes([number]) * 3000)
    write_sums(folder, {})
    return folder


def sha256sum(checkpoint: Path) -> bool:
    """What coreutils says."""
    command = ["sha256sum", "--check", "--strict", "--status", str(SUMS)]
    return subprocess.run(command, cwd=checkpoint, check=False).returncode == 0


def fault_of(checkpoint: Path) -> str:
    with pytest.raises(ValueError, match=".") as raised:
        check_sums(checkpoint, NEEDED, [])
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_as_sha256sum_reads_it(checkpoint: Path) -> None:
    check_sums(checkpoint, NEEDED, [])
    assert sha256sum(checkpoint)
    # What somebody puts beside the checkpoint is theirs.
    (checkpoint / "README.md").write_text("mine")
    check_sums(checkpoint, NEEDED, [])
    (checkpoint / "probe.json").write_text("{}")
    assert not sha256sum(checkpoint)
    assert "probe.json is damaged: its SHA-256" in fault_of(checkpoint)


def test_every_bit_of_the_list_counts(checkpoint: Path) -> None:
    """None may be turned over and the checkpoint be taken for whole."""
    path = checkpoint / SUMS
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        fault_of(checkpoint)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        fault_of(checkpoint)


def test_who_compares_what(checkpoint: Path) -> None:
    (checkpoint / OF_A_RANK).write_bytes(b"other")
    check_sums(checkpoint, NEEDED, [OF_A_RANK])
    assert OF_A_RANK in fault_of(checkpoint)
    # A digest that is known already is taken as it is.
    known = "0" * 64
    assert write_sums(checkpoint, {OF_A_RANK: known})[OF_A_RANK] == known


def test_files_that_are_not_there(checkpoint: Path) -> None:
    (checkpoint / "probe.json").unlink()
    assert "it has no probe.json, which training_state/SHA256SUMS lists" in fault_of(checkpoint)
    # Opened, it would wait for a writer.
    os.mkfifo(checkpoint / "probe.json")
    assert "it has no probe.json" in fault_of(checkpoint)
    (checkpoint / SUMS).write_text(f"{'0' * 64}  ../{checkpoint.name}/probe.json\n")
    assert "line 1 is not a digest and a name" in fault_of(checkpoint)
    (checkpoint / SUMS).unlink()
    assert "it has no training_state/SHA256SUMS" in fault_of(checkpoint)
