"""Check that a run folder is taken for its latest checkpoint wherever one may be named, and that
this is said."""

import shutil
from pathlib import Path

import pytest

from megalora.adapters.files import WEIGHTS
from tests.command_outcome import outcome
from tests.refused_commands import adapter
from tests.train.folders import found, save_filled

__all__ = ["adapter"]  # a fixture


@pytest.fixture
def run(adapter: Path, tmp_path: Path) -> Path:
    """A run with two checkpoints, of which ``latest`` names the first."""
    run = tmp_path / "run"
    for name in ("step_000003", "step_000006"):
        shutil.copytree(adapter, run / name)
    (run / "step_000006" / WEIGHTS).write_bytes(b"not the one")
    (run / "latest").write_text("step_000003\n")
    return run


def test_commands_take_the_latest_checkpoint_and_say_so(
    capsys: pytest.CaptureFixture[str], run: Path, tiny: Path, tmp_path: Path
) -> None:
    note = f"{run} is a run folder: taking step_000003, its latest checkpoint\n"
    checkpoint = run / "step_000003"
    code, shown, err = outcome(capsys, "inspect", checkpoint)
    assert (code, err) == (0, "")
    assert outcome(capsys, "inspect", run) == (0, shown, note)
    for name, source in (("one", run), ("two", checkpoint)):
        code, _, err = outcome(capsys, "export", source, tmp_path / name)
        assert code == 0 and err == (note if source == run else "")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    code, out, err = outcome(capsys, "import", run, tmp_path / "three", "--base", tiny)
    assert code == 0 and err == note and f"wrote {tmp_path / 'three'}" in out


def test_a_run_without_latest_names_its_checkpoints(
    capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    (run / "latest").unlink()
    code, out, err = outcome(capsys, "inspect", run)
    assert (code, out) == (2, "")
    assert f"{run} is not an adapter folder" in err and "step_000003, step_000006" in err


def test_a_run_resumes_from_the_latest_checkpoint_of_another(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for step in (2, 4):
        save_filled(tmp_path / f"other/step_{step:06d}")
    (tmp_path / "other/latest").write_text("step_000002\n")
    answer = found(tmp_path / "run", resume=str(tmp_path / "other"))
    assert answer.state is not None and answer.state.step == 2
    other = tmp_path / "other"
    assert answer.notes == [f"{other} is a run folder: taking step_000002, its latest checkpoint"]
