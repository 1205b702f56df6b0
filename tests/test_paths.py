"""``~`` is the home folder wherever a path is taken, and files that a config names are looked for
before ranks start."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megalora.cli import main as cli
from megalora.config import CheckpointConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from megalora.config.file import load_config, save_config
from megalora.hf.folder import local_folder
from megalora.paths import expand, user_path
from megalora.planner.gpus import find_machine
from megalora.preflight import check_paths
from megalora.serve.adapter_names import named_adapters


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a base, data and a checkpoint; the current folder is another one."""
    home = tmp_path / "home"
    for folder in ("base", "run/step_000001/training_state", "elsewhere"):
        (home / folder).mkdir(parents=True)
    (home / "base/config.json").write_text("{}")
    (home / "x.jsonl").write_text("{}\n")
    (home / "run/step_000001/training_state/state.json").write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "elsewhere")
    return home


def config(**changes: Any) -> RunConfig:
    """All paths below ``~``."""
    values = {
        "path": "~/base",
        "train": "~/x.jsonl[:1]",
        "eval": "~/x.jsonl",
        "dir": "~/new/run",
        "resume": False,
    }
    values |= changes
    return RunConfig(
        model=ModelConfig(path=values["path"]),
        data=DataConfig(train=values["train"], eval=values["eval"]),
        train=TrainConfig(steps=1),
        checkpoint=CheckpointConfig(dir=values["dir"], resume=values["resume"]),
    )


def test_every_path_of_a_config_is_expanded(home: Path) -> None:
    c = config(resume="~/run/step_000001")
    assert c.model.path == f"{home}/base"
    assert (c.data.train, c.data.eval) == (f"{home}/x.jsonl[:1]", f"{home}/x.jsonl")
    assert (c.checkpoint.dir, c.checkpoint.resume) == (f"{home}/new/run", f"{home}/run/step_000001")
    check_paths(c)
    # What is written down is expanded too: whoever resumes may be somebody else.
    save_config(c, home / "written.yaml")
    assert load_config("~/written.yaml") == c
    assert load_config("~/written.yaml", ["checkpoint.dir=~/b"]).checkpoint.dir == f"{home}/b"
    # A program that takes ~ for a name would have made this folder.
    assert not (home / "elsewhere" / "~").exists()


@pytest.mark.parametrize("option", ["path", "train", "eval", "dir", "resume"])
def test_a_home_of_nobody_is_refused(home: Path, option: str) -> None:
    with pytest.raises(
        ValueError, match=r"=~nobody-here/x: ~nobody-here is not a user's home folder here"
    ):
        config(**{option: "~nobody-here/x"})


def test_names_without_a_tilde_stay() -> None:
    # A name on the hub, a tilde inside a name, a file that is called so, a data set on the hub.
    for name in ("Qwen/Qwen3-30B-A3B", "a~b", "./~", "org/name:test[:2]"):
        assert expand(name, "x") == name


def test_paths_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert user_path("~/x.jsonl") == home / "x.jsonl"
    assert local_folder("~/base") == home / "base"
    assert named_adapters(["one=~/run/step_000001"]) == {"one": home / "run/step_000001"}
    with pytest.raises(ValueError, match="--gpu .*none.json is neither"):
        find_machine("~/none.json")
    # Arguments and options of commands, of which two stand for all.
    options = cli._parser().parse_args(["export", "~/a", "~/b"])
    assert (options.checkpoint, options.out) == (home / "a", home / "b")
    plan = ["plan", "~/a", "--gpus", "1", "--out", "~/b", "--figure", "~/c"]
    options = cli._parser().parse_args(plan)
    assert (options.config, options.out, options.figure) == (home / "a", home / "b", home / "c")


WRONG = [
    # Not on this machine, and no name of the hub either, which has one slash and no dots in front.
    ({"path": "~/none/at/all"}, "model.path=.*/none/at/all: no such folder"),
    ({"path": "../none"}, r"model.path=\.\./none: no such folder"),
    ({"path": "~/x.jsonl"}, "model.path=.*x.jsonl is a file; name the folder"),
    ({"path": "~/elsewhere"}, "model.path=.*elsewhere: there is no config.json in this folder"),
    ({"train": "~/none.jsonl"}, "none.jsonl: no such file"),
    ({"eval": "~/none.jsonl"}, "none.jsonl: no such file"),
    # What is there is no file of conversations, or has a slice that is none.
    ({"train": "~/base"}, "base: this is a folder; name one"),
    ({"train": "~/x.jsonl[1]"}, "the slice at the end is not understood"),
    # A run could not write where a file is in the way.
    ({"dir": "~/x.jsonl"}, "checkpoint.dir=.*x.jsonl is a file; choose a folder"),
    (
        {"dir": "~/x.jsonl/run"},
        "checkpoint.dir=.*x.jsonl/run cannot be written: .*x.jsonl is a file",
    ),
    (
        {"resume": "step_000001", "dir": "~/run"},
        "checkpoint.resume=step_000001 is not a checkpoint: it has no .*state.json; did you mean"
        " checkpoint.resume=.*home/run/step_000001",
    ),
    (
        {"resume": "~/run/step_000002"},
        "checkpoint.resume=.*step_000002 is not a checkpoint: it has no training_state/state.json$",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_not_there_is_said_before_ranks_start(
    home: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_paths(config(**changes))


def test_a_folder_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root can write to every folder, so the system's answer is made up."""

    def may_not_write_home(path: Any, mode: int) -> bool:
        return not (str(path).endswith("home") and mode & os.W_OK)

    def may_not_read_data(path: Any, mode: int) -> bool:
        return not str(path).endswith("x.jsonl")

    # The run's folder would be made in the first folder above it that exists, the home.
    monkeypatch.setattr(os, "access", may_not_write_home)
    with pytest.raises(
        ValueError, match="checkpoint.dir=.* cannot be written: no permission in .*home"
    ):
        check_paths(config())
    monkeypatch.setattr(os, "access", may_not_read_data)
    with pytest.raises(ValueError, match=r"x.jsonl cannot be read: no permission"):
        check_paths(config())


def test_hub_names_are_left_to_the_ranks(home: Path) -> None:
    check_paths(config(path="Qwen/Qwen3-30B-A3B", train="org/name:test[:9]", eval=None))


def test_train_looks_before_it_starts_ranks(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Through the command itself, as a user meets it.
    monkeypatch.setattr("megalora.cli.rl.torchrun", lambda *_: pytest.fail("ranks were started"))
    sections = {
        "model": {"path": "~/base"},
        "data": {"train": "~/none.jsonl"},
        "train": {"steps": 1},
    }
    (home / "c.yaml").write_text(json.dumps(sections))
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "~/c.yaml"])
    assert caught.value.code == 2
    assert f"{home}/none.jsonl: no such file" in capsys.readouterr().err
