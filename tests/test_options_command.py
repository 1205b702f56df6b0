"""Check that ``megalora options`` tells of every option what the config does with it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from megalora.config import RunConfig
from megalora.config.file import load_config
from tests.command_outcome import outcome
from tests.json_schema import is_valid
from tests.minimal_config import MINIMAL, minimal

__all__ = ["minimal"]  # a fixture
ROOT = Path(__file__).parents[1]


def all_options() -> list[str]:
    names = []
    for section, cls in get_type_hints(RunConfig).items():
        names += [f"{section}.{field.name}" for field in fields(cls)]
    return names


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, out, err = outcome(capsys, "options", *arguments)
    assert (code, err) == (0, "")
    return out


def test_every_option_is_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    listed = printed(capsys)
    assert "  train.lr                       0.0001\n" in listed
    assert "\ntrain: Steps, batches, the optimizer, and checks of the run.\n" in listed
    for name in all_options():
        assert f"  {name} " in listed
    # A section is explained option by option, as each of them is by itself.
    section = printed(capsys, "checkpoint")
    for field in fields(get_type_hints(RunConfig)["checkpoint"]):
        assert printed(capsys, f"checkpoint.{field.name}").rstrip() in section
    one = printed(capsys, "train.schedule")
    assert one.startswith("train.schedule: cosine, linear, constant; default cosine\n    Decay of")
    assert "model.path: text; required\n" in printed(capsys, "model.path")
    assert "``" not in listed + section + one and max(map(len, section.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no section or option trian; did you mean train?"),
        (["train.warm_up"], "there is no section or option train.warm_up; did you mean train.warm"),
        # The key alone, in all sections that have it.
        (["seed"], "there is no section or option seed; did you mean data.seed or train.seed?"),
        (["qqq"], "there is no section or option qqq; sections: model, data, train, objective,"),
        (["lora", "--schema"], "--schema is of the whole config; leave lora out"),
    ],
)  # fmt: skip
def test_what_is_not_there(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = outcome(capsys, "options", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"megalora: {message}")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    from megalora.config.schema import schema

    # As it is printed: what JSON cannot hold would be lost here.
    return json.loads(json.dumps(schema()))


def test_the_schema_is_printed_and_describes_every_option(
    capsys: pytest.CaptureFixture[str], schema: dict[str, Any]
) -> None:
    assert json.loads(printed(capsys, "--schema")) == schema
    named = []
    for section, content in schema["properties"].items():
        if section != "base":
            named += [f"{section}.{key}" for key in content["properties"]]
    assert named == all_options()
    said = schema["properties"]["train"]["properties"]["warmup"]["description"]
    assert said.startswith("Number of steps over which") and said.endswith("(default: 0)")


# configs/bench holds a model's config as well, and lists of runs.
RUNS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/sft").glob("*.yaml")])


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_our_own_configs_fit_the_schema(path: Path, schema: dict[str, Any]) -> None:
    assert is_valid(yaml.safe_load(path.read_text()), schema)


# An option and a value, and whether both the schema and the config take it.
VALUES = [
    ("base", "other.yaml", True), ("base", 3, False),
    ("train.steps", 3, True), ("train.steps", None, True), ("train.steps", 1.5, False),
    ("train.steps", True, False), ("train.lr", 1, True), ("train.lr", "fast", False),
    ("train.lr", None, False), ("train.warm_up", 3, False), ("trian.steps", 3, False),
    ("train.schedule", "linear", True), ("train.schedule", "step", False),
    ("train.recompute", "full", True), ("train.recompute", {"layers": 2}, True),
    ("train.recompute", {"layers": 2, "rest": "full"}, False),
    ("train.recompute", {"rest": "off"}, False), ("train.recompute", {"layer": 2}, False),
    ("data.train", [{"path": "a", "weight": 0.5}, {"path": "b", "weight": 2}], True),
    ("data.train", [{"path": "a", "format": {"messages": "chat"}}], True),
    ("data.train", [{"weight": 1}], False), ("data.train", ["a.jsonl"], False),
    ("data.eval", 0.125, True), ("data.eval", True, False),
    ("data.format", {"messages": 3}, False), ("data.allow_left_out", ["reasoning"], True),
    ("data.allow_left_out", ["all"], False), ("lora.rank_pattern", {"q_proj": 2}, True),
    ("lora.rank_pattern", {"q_proj": "two"}, False), ("lora.layers", [0, 2], True),
    ("lora.layers", [0, "2-"], False), ("checkpoint.resume", True, True),
    ("checkpoint.resume", "a/b", True), ("checkpoint.resume", 1, False), ("log", 3, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "fits"), VALUES, ids=str)
def test_the_schema_takes_what_the_config_takes(
    tmp_path: Path, schema: dict[str, Any], name: str, value: Any, fits: bool
) -> None:
    config = yaml.safe_load(MINIMAL)
    (tmp_path / "other.yaml").write_text(MINIMAL)
    section, _, key = name.partition(".")
    if key:
        config.setdefault(section, {})[key] = value
    else:
        config[section] = value
    # A config without steps needs epochs, whatever the schema says.
    config["train"].setdefault("epochs", 1)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    assert is_valid(config, schema) is fits
    if fits:
        load_config(path)
    else:
        with pytest.raises(ValueError):
            load_config(path)
