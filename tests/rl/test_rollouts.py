"""Episodes as samples, and as lines of a record."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megalora.config import ObjectiveConfig
from megalora.config.policy import PolicyConfig
from megalora.data.splits import Split, load_split
from megalora.data.tokenizer import load_tokenizer
from megalora.rl.collect import Round
from megalora.rl.episode import Episode, Prompt
from megalora.rl.rollouts import is_fresh, numbers_of, prompts_done, samples_of, write_round


def episode(number: int, sample: int, reward: float | None, **others: object) -> Episode:
    """Two sampled tokens around one that a tool gave."""
    values: dict[str, object] = {
        "prompt": Prompt(number, {"level": number}, [1, 2, 3], "asked", "expected"),
        "sample": sample, "completion_ids": [10 * number, 5, sample],
        "logprobs": [-0.5, None, -0.25], "mask": [1, 0, 1], "versions": [4, 4, 5],
        "truncated": False, "text": "said", "reward": reward,
        "rewards": {} if reward is None else {"good": reward},
    }  # fmt: skip
    return Episode(**(values | others))  # type: ignore[arg-type]


def test_advantages_are_of_a_prompt_s_group() -> None:
    rewards = {0: [1.0, 0.0, 0.0], 1: [2.0, None, 4.0], 2: [7.0, 7.0, 7.0], 3: [0.0, 1.0, 3.0]}
    groups = [[episode(n, i, r) for i, r in enumerate(of)] for n, of in rewards.items()]
    policy = PolicyConfig(advantage_std="none")
    samples, by_step = samples_of(groups, policy, 2)
    # What nobody judged is left out; a group whose rewards are alike is not, unless asked to.
    assert [len(places) for places in by_step] == [5, 6]
    assert np.concatenate(by_step).tolist() == list(range(11))
    expected = [2 / 3, -1 / 3, -1 / 3, -1, 1, 0, 0, 0, -4 / 3, -1 / 3, 5 / 3]
    assert [sample.value for sample in samples] == pytest.approx(expected)
    one = samples[3]
    assert one.input_ids.tolist() == [1, 2, 3, 10, 5, 0]
    # Neither the prompt nor what a tool said is learned.
    assert one.loss_mask.tolist() == [False, False, False, True, False, True]
    found = [None if math.isnan(value) else value for value in one.floats["logprobs"].tolist()]
    assert found == [None, None, None, -0.5, None, -0.25]
    assert (one.rollout.group, one.rollout.version) == (1, 4)
    dropped, _ = samples_of(groups, PolicyConfig(drop_even_groups=True), 2)
    assert len(dropped) == 8


def test_numbers_of_a_round() -> None:
    groups = [
        [episode(0, 0, 1.0), episode(0, 1, 0.0, truncated=True)],
        [episode(1, 0, None), episode(1, 1, 2.0, versions=[2, 2, 2], rewards={"good": 2, "s": 4})],
    ]
    found = numbers_of(Round(groups, [[episode(2, 0, 0.0)]]), 6)
    assert found == {
        "completion_tokens": 2, "truncated": 0.2, "unjudged": pytest.approx(0.2),
        "staleness": pytest.approx(2.4), "staleness_max": 4, "groups_left_out": 1,
        "groups_alike": pytest.approx(2 / 3), "reward": 0.75,
        "reward_std": pytest.approx(math.sqrt(0.6875)), "reward/good": 0.75, "reward/s": 4,
    }  # fmt: skip


def test_a_round_is_fresh_when_all_of_its_tokens_are() -> None:
    new = episode(0, 0, 1.0, versions=[5, 5, 5])
    sent_on = episode(0, 1, 1.0)
    assert is_fresh(Round([[new, new]], [[sent_on]]), 5)
    assert not is_fresh(Round([[new, new]], []), 6)
    # Its last tokens are, its first are not.
    assert not is_fresh(Round([[new, sent_on]], []), 5)


def test_a_record_can_be_trained_on_as_a_file(tiny: Path, tmp_path: Path) -> None:
    groups = [[episode(n, i, float(n * i)) for i in range(2)] for n in (1, 2)]
    write_round(tmp_path, 3, 6, Round(groups, [[episode(7, 0, 1.0)]]))
    write_round(tmp_path, 4, 8, Round(groups, []))
    path = tmp_path / "step_000006.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["trained"] for row in rows] == [True] * 4 + [False]
    objective = ObjectiveConfig(name="grpo")
    split: Split = load_split(
        f"{path}[:4]", load_tokenizer(tiny), format="auto", max_length=64,
        cache=str(tmp_path / "cache"), policy=objective.learned_policy,
    )  # fmt: skip
    again, _ = samples_of(groups, PolicyConfig(), 1)
    for sample, expected in zip(split.samples, again, strict=True):
        assert sample.input_ids.tolist() == expected.input_ids.tolist()
        assert sample.loss_mask.tolist() == expected.loss_mask.tolist()
        assert sample.value == pytest.approx(expected.value, abs=1e-6)
        np.testing.assert_array_equal(sample.floats["logprobs"], expected.floats["logprobs"])
        # Of three tokens, the last one was sampled by version 5.
        assert sample.rollout.version == expected.rollout.version == 4
    # A run that went back to round 4 forgets what it had begun of it.
    assert prompts_done(tmp_path, 5) == ({1, 2, 7}, 2)
    assert prompts_done(tmp_path, 4) == ({1, 2, 7}, 1) and prompts_done(tmp_path, 3) == (set(), 0)
    assert prompts_done(tmp_path, 9) == (set(), 0) == prompts_done(tmp_path / "none", 1)
