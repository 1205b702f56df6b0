"""The table of others' keys: complete for the TRL that is installed, and true of our options."""

import re
from dataclasses import fields
from pathlib import Path

from trl import GRPOConfig
from trl.trainer.base_config import _BaseConfig

from megalora.config.reference import find

TEXT = (Path(__file__).parents[2] / "docs" / "rl-keys.md").read_text()
SECTIONS = ("model", "data", "train", "objective", "parallel", "lora", "checkpoint", "log", "rl")


def _rows(title: str) -> list[tuple[str, str]]:
    """(their keys, what is said here) of a table."""
    section = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [tuple(line.strip("| ").split(" | ")) for line in section.splitlines() if "|" in line]
    # Without the head and the line below it.
    return [(keys, here) for keys, here in rows[2:]]


def _named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_every_field_of_trl_is_there_once() -> None:
    common = {field.name for field in fields(_BaseConfig)}
    own = {field.name for field in fields(GRPOConfig)} - common
    listed = [name for keys, _ in _rows("TRL") for name in _named(keys)]
    assert len(listed) == len(set(listed))
    assert own - {"vllm_importance_sampling_cap"} <= set(listed)
    assert set(listed) <= own | common


def test_every_option_of_ours_exists() -> None:
    for title in ("AReaL", "verl", "TRL"):
        for _, here in _rows(title):
            for name in _named(here):
                # ``policy.kl: k3`` names a value too.
                key = name.partition(":")[0]
                full = f"objective.{key}" if key.startswith("policy.") else key
                if "." in full and full.split(".")[0] in SECTIONS:
                    # Raises for a name that is none.
                    find(full)


def test_nothing_is_left_without_an_answer() -> None:
    for title in ("AReaL", "verl", "TRL"):
        rows = _rows(title)
        assert len(rows) > 20
        for keys, here in rows:
            assert _named(keys), keys
            assert here != "none" and len(here) > 3, keys
