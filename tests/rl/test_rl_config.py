"""What the ``rl`` section asks of a config."""

from pathlib import Path

import pytest

from megalora.config import RunConfig
from megalora.config.file import load_config
from megalora.preflight import check_command
from tests.minimal_config import MINIMAL

GOOD = (
    "objective.name=grpo", "rl.rewards=exact", "train.steps=8",
    "train.global_batch_size=16",
)  # fmt: skip


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def loaded(path: Path, *overrides: str) -> RunConfig:
    return load_config(path, [*GOOD, *overrides])


def test_a_config_that_samples(minimal: Path) -> None:
    config = loaded(minimal, "rl.rewards={exact: 1, 'mine.py:good': 0.5}")
    assert config.rl.weights == {"exact": 1.0, "mine.py:good": 0.5}
    check_command(config, samples=True)
    with pytest.raises(ValueError, match="start it with megalora rl"):
        check_command(config, samples=False)
    offline = load_config(minimal, ["objective.name=grpo"])
    with pytest.raises(ValueError, match="megalora rl needs rl.rewards"):
        check_command(offline, samples=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.name=sft", "rl.rewards needs objective.name=grpo, got sft"),
        ("rl.group_size=1", "rl.group_size=1: a completion is compared with others"),
        ("rl.group_size=3", "must be a multiple of rl.group_size=3"),
        ("rl.steps_per_rollout=3", "train.steps=8 must be a multiple of rl.steps_per_rollout=3"),
        ("rl.rewards={}", "rl.rewards is an empty mapping"),
        ("rl.reward_timeout=.nan", "rl.reward_timeout must be above 0, got nan"),
        ("rl.eval_temperature=-1", "rl.eval_temperature must be 0 or above"),
        ("rl.largest_gap=0", "rl.largest_gap must be above 0"),
        ("rl.max_new_tokens=4096", "leaves no room for a prompt in data.max_length=4096"),
        ("train.epochs=2", "rl.rewards needs train.steps, and no train.epochs"),
        (
            "parallel.pp=2",
            "sampling by the run's own model (rl.servers=[]) does not run with parallel.pp=2",
        ),
        (
            "parallel.cp=2",
            "sampling by the run's own model (rl.servers=[]) does not run with parallel.cp=2",
        ),
        ("lora.dropout=0.1", "lora.dropout does not go with rl.rewards: completions are sampled"),
        ("train.relora={every: 2}", "train.relora does not go with rl.rewards"),
        ("train.check_base=loss", "train.check_base=loss does not go with rl.rewards"),
        ("rl.staleness=1", "rl.staleness=1 does nothing without rl.servers"),
        ("rl.sync=http", "rl.sync=http does nothing without rl.servers"),
        ("rl.servers=[node:8000]", "rl.servers: node:8000 is not the URL of a server"),
        ("rl.servers=[http://a:8000/v1]", "ends in /v1, which is added to it"),
        ("rl.servers=[http://a, http://a]", "names a server twice"),
        ("objective.policy={proximal: start}", "objective.policy.proximal=start does not go with"),
        ("objective.policy={proximal: data}", "objective.policy.proximal=data does not go with"),
    ],
)
def test_what_does_not_go_with_it(override: str, message: str, minimal: Path) -> None:
    with pytest.raises(ValueError) as refused:
        loaded(minimal, override)
    assert message in str(refused.value)


@pytest.mark.parametrize("option", ["train.eval_every", "checkpoint.every"])
def test_nothing_is_kept_in_the_middle_of_a_rollout(option: str, minimal: Path) -> None:
    loaded(minimal, "rl.steps_per_rollout=2", f"{option}=4")
    with pytest.raises(ValueError, match=f"{option}=3 must be a multiple of rl.steps_per_rollout"):
        loaded(minimal, "rl.steps_per_rollout=2", f"{option}=3")


def test_options_without_rewards_do_nothing(minimal: Path) -> None:
    with pytest.raises(ValueError, match="rl.group_size=4 does nothing without rl.rewards"):
        load_config(minimal, ["rl.group_size=4"])
    with pytest.raises(ValueError, match="proximal=recompute needs completions that the run"):
        load_config(minimal, ["objective.name=grpo", "objective.policy={proximal: recompute}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.use_dora=true", "lora.use_dora: vLLM does not load it"),
        ("lora.modules_to_save=[norm]", "lora.modules_to_save: vLLM does not load it"),
        ("checkpoint.serve=http://a", "checkpoint.serve does not go with rl.servers"),
    ],
)
def test_what_servers_cannot_sample_from(override: str, message: str, minimal: Path) -> None:
    config = loaded(minimal, "rl.servers=[http://a]", "rl.staleness=1", "parallel.pp=2")
    assert config.rl.staleness == 1
    with pytest.raises(ValueError, match=message):
        loaded(minimal, "rl.servers=[http://a]", override)
    with pytest.raises(ValueError, match="recompute does not go with lora.use_dora"):
        loaded(minimal, "lora.use_dora=true", "objective.policy={proximal: recompute}")
