"""The published configs of runs that sample, and the script that starts them."""

import subprocess
from pathlib import Path

import pytest

from megalora.config.file import load_config
from megalora.preflight import check_command
from megalora.rl.environment import load_environment
from megalora.rl.rewards.load import check_rewards

ROOT = Path(__file__).parents[2]
CONFIGS = sorted([*(ROOT / "configs/rl").glob("*.yaml"), *ROOT.glob("recipes/grpo/*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_starts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    check_command(config, samples=True)
    config.check_training()
    config.check_world(2 if "recipes" in path.parts else 8)
    check_rewards(config.rl.weights)
    load_environment(config.rl.environment)
    assert len(CONFIGS) == 3


def test_the_script_says_how_it_is_called() -> None:
    script = ROOT / "launch/rl.sh"
    for arguments in ([], ["serve", "base"], ["train"], ["other"]):
        run = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == 2 and run.stderr.startswith("usage: launch/rl.sh serve BASE")
    run = subprocess.run([script, "train", "no.yaml"], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "no.yaml" in run.stderr
