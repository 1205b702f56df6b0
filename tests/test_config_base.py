"""Check that a config takes what it does not say from its base, and that errors name the file."""

from pathlib import Path

import pytest

from megalora.config import RecomputeLayers
from megalora.config.file import load_config
from tests.minimal_config import MINIMAL, refusal


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with ``run.yaml``, based on ``shared/all.yaml``, based on ``least.yaml``."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/least.yaml").write_text(MINIMAL)
    (tmp_path / "shared/all.yaml").write_text(
        "base: least.yaml\n"
        "train: {lr: 0.5, seed: 3, recompute: {layers: 9, rest: selective}}\n"
        "lora: {rank: 2, rank_pattern: {q_proj: 8}}\n"
    )
    (tmp_path / "run.yaml").write_text(
        "base: shared/all.yaml\n"
        "train: {seed: 4, recompute: {layers: 2}, warmup: '${train.steps}'}\n"
    )
    return tmp_path


def test_what_a_file_does_not_say_is_its_base_s(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A base is looked for beside the file that names it, wherever the command is called.
    monkeypatch.chdir("/")
    config = load_config(files / "run.yaml", ["train.lr=0.25"])
    assert (config.train.seed, config.train.lr, config.train.steps) == (4, 0.25, 3)
    # An option is replaced whole; a reference is to the value that holds in the end.
    assert config.train.recompute == RecomputeLayers(layers=2)
    assert config.lora.rank_pattern == {"q_proj": 8} and config.lora.rank == 2
    assert config.train.warmup == 3
    assert load_config(files / "run.yaml", ["train.steps=7"]).train.warmup == 7
    # By a whole path too.
    (files / "other.yaml").write_text(f"base: {files}/shared/all.yaml\ntrain: {{steps: 5}}\n")
    assert load_config(files / "other.yaml").train.steps == 5


def test_a_circle_is_refused(files: Path) -> None:
    run = files / "run.yaml"
    (files / "shared/least.yaml").write_text(f"base: ../run.yaml\n{MINIMAL}")
    again = f"{files}/shared/../run.yaml"
    assert refusal(run) == (
        f"{files}/shared/least.yaml: base leads round in a circle: {run} ->"
        f" {files}/shared/all.yaml -> {files}/shared/least.yaml -> {again}"
    )
    run.write_text("base: run.yaml\n")
    assert refusal(run) == f"{run}: base leads round in a circle: {run} -> {run}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # What only the base's own file holds, and what the file above it sets or breaks.
        ("shared/least.yaml", "model: {path: m}\ntrain: {steps: 0}\ndata: {train: a}\n",
         "train.steps must be above 0, got 0"),
        ("shared/all.yaml", "base: least.yaml\nlora: {r: 3}\n", "unknown config key lora.r; known"),
        ("shared/all.yaml", "base: least.yaml\nlaro: {rank: 3}\n",
         "unknown config key laro; known keys: model, data, train, objective, parallel, lora"),
        ("shared/all.yaml", "base: least.yaml\nlog: 3\n", "log is a section, got 3"),
        ("run.yaml", "base: shared/all.yaml\ntrain: {lr: fast}\n",
         "train.lr must be a number, got 'fast'"),
        ("run.yaml", "base: shared/all.yaml\ntrain: {recompute: {layers: x}}\n",
         "train.recompute.layers must be an integer, got 'x'"),
        # What cannot be read at all.
        ("shared/all.yaml", "base: least.yaml\ntrain: {lr: 1\n", "while parsing a flow mapping"),
        ("shared/all.yaml", "- 1\n", "expected sections (model, data, train, ...), not a list"),
        ("shared/all.yaml", "base: [least.yaml]\n", "base must be the name of a file, got ['le"),
        ("shared/all.yaml", "base: ''\n", "base is empty; name a file or a folder"),
    ],
)  # fmt: skip
def test_errors_name_the_file(files: Path, name: str, text: str, message: str) -> None:
    (files / name).write_text(text)
    assert refusal(files / "run.yaml").startswith(f"{files / name}: {message}")


def test_a_base_that_is_not_there_is_named_with_who_names_it(files: Path) -> None:
    run = files / "run.yaml"
    run.write_text("base: nowhere.yaml\n")
    said = f"{run}: base=nowhere.yaml: {files}/nowhere.yaml: no such config file"
    assert refusal(run) == said
    # Of what no file gives, and no single option is to blame for, all files are named.
    run.write_text("base: shared/all.yaml\n")
    (files / "shared/least.yaml").write_text("data: {train: a}\ntrain: {steps: 1}\n")
    three = f"{run} over {files}/shared/all.yaml over {files}/shared/least.yaml"
    assert refusal(run) == f"{three}: config is missing model"
    # An override is nobody's file.
    assert refusal(run, "model.path=m", "train.lr=x") == (
        f"{three}: train.lr must be a number, got 'x'"
    )
    assert refusal(run, "base=x").startswith("override 'base=x': base stands in a file")


def test_steps_win_over_epochs_that_are_given_below_them(files: Path) -> None:
    least = files / "shared/least.yaml"
    least.write_text(MINIMAL.replace("steps: 3", "epochs: 2"))
    run = files / "run.yaml"
    run.write_text("base: shared/all.yaml\ntrain: {steps: 5}\n")
    for config in (load_config(run), load_config(least, ["train.steps=5"])):
        assert (config.train.steps, config.train.epochs) == (5, 2.0)
    # Above them they would say nothing, although they were asked for last.
    fix = "Add train.steps=null, or leave train.epochs out"
    expected = f"train.epochs=1 would have no effect: train.steps=5 in {run} counts. {fix}"
    assert refusal(run, "train.epochs=1") == expected
    assert load_config(run, ["train.epochs=1", "train.steps=null"]).train.epochs == 1.0
