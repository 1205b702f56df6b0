"""Rows of rollouts: what is read of them, what is refused, and what a file's rewards become."""

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.utils import nanstd

from megalora.config import DataConfig, ObjectiveConfig
from megalora.config.policy import PolicyConfig
from megalora.data.advantages import credited, of_batch, of_groups, overlong_penalty
from megalora.data.batch import flat_row
from megalora.data.samples import digest_of_samples
from megalora.data.show import parts_of
from megalora.data.splits import Split, load_data
from megalora.data.vocabulary import check_vocabulary
from tests.data.chat_tokenizer import make_tokenizer
from tests.jsonl import write_jsonl

ROW: dict[str, Any] = {
    "prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 10, 11], "logprobs": [-1.5, -0.25, None, 0.0],
    "reward": 1.0,
}  # fmt: skip
OTHER = {**ROW, "completion_ids": [12, 13], "logprobs": [-2.0, -3.0], "reward": 0.0}


def load(tmp_path: Path, rows: list[dict[str, Any]], data: Any = None, **policy: Any) -> Split:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"train": str(tmp_path / "rows.jsonl"), "cache": str(tmp_path / "cache")}
    objective = ObjectiveConfig(name="grpo", policy=PolicyConfig(**policy) if policy else None)
    config = DataConfig(**(options | (data or {})))
    return load_data(config, make_tokenizer(), objective=objective)[0]


def values_of(split: Split) -> list[float]:
    return [sample.value for sample in split.samples]


def without(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != column}


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [{**ROW, "mask": [1, 0, 1, 1], "version": 3, "truncated": True}, OTHER]
    split = load(tmp_path, rows)
    first, second = split.samples
    assert first.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert first.loss_mask.tolist() == [False] * 3 + [True, False, True, True]
    assert first.floats["logprobs"][3:].tolist()[:2] == [-1.5, -0.25]
    assert np.isnan(first.floats["logprobs"]).tolist() == [True] * 3 + [False, False, True, False]
    assert first.rollout.version == 3 and first.rollout.truncated and not second.rollout.truncated
    # One prompt is one group: the difference of two over their deviation.
    scale = stdev([1.0, 0.0]) + 1e-4
    assert values_of(split) == pytest.approx([0.5 / scale, -0.5 / scale])
    assert "2 rollouts" in split.summary() and "sampled by versions 0 to 3" in split.summary()
    # A label's numbers stand where it is predicted; a tool's token has none.
    row = flat_row([second, first], filler=np.array([1]), multiple_of=16, columns=split.floats)
    assert row.columns["logprobs"].tolist()[:3] == [-2, -3, -1.5]
    assert math.isnan(row.columns["logprobs"][3]) and row.columns["logprobs"][4] == 0
    assert len(row.columns["logprobs"]) == 5 == sum(row.targets)
    empty = flat_row([], filler=np.array([1]), multiple_of=4, columns=split.floats)
    assert empty.columns["logprobs"].shape == (0,)
    texts = parts_of(first, make_tokenizer())
    assert [in_loss for _, in_loss in texts] == [False, True, False, True]


def test_a_conversation_is_tokenised(tmp_path: Path) -> None:
    def row(answer: str, reward: float, **beside: Any) -> dict[str, Any]:
        said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}]
        return {"messages": said, "reward": reward, **beside}

    split = load(tmp_path, [row("4", 1), row("5", 0), row("6", 0)], proximal="current")
    values = values_of(split)
    assert values[0] > 0 > values[1] == values[2]
    with pytest.raises(ValueError, match="columns logprobs are of tokens, and this row has text"):
        load(tmp_path, [row("4", 1, logprobs=[-1.0])])


def test_groups_are_by_name_or_by_prompt_wherever_they_stand(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    rewards = [3.0, 0.0, 1.0, 4.0, 5.0, 1.0]
    for i, reward in enumerate(rewards):
        rows.append({**ROW, "prompt_ids": [5 + i % 2], "reward": reward})
    by_prompt = values_of(load(tmp_path, rows))
    for place, value in enumerate(by_prompt):
        group = rewards[place % 2 :: 2]
        assert value == pytest.approx((rewards[place] - mean(group)) / (stdev(group) + 1e-4))
    named = [{**row, "prompt_ids": [5], "group": [1, "1"][i % 2]} for i, row in enumerate(rows)]
    assert values_of(load(tmp_path, named)) == by_prompt


REWARDS = torch.tensor([1.0, 0.0, 0.0, 4.0, 2.0, 2.5, -1.0, 3.0, 0.5, 7.0, 7.5, 1.5]).double()
GROUPS = torch.arange(4).repeat_interleave(3)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trl_s(scale: str) -> None:
    """As TRL's trainer computes them from rewards that stand group by group."""
    by_group = REWARDS.view(4, 3)
    centred = (by_group - by_group.mean(1, keepdim=True)).flatten()
    deviations = torch.ones(12).double() - 1e-4
    if scale == "group":
        deviations = nanstd(by_group, dim=1).repeat_interleave(3)
    elif scale == "batch":
        deviations = nanstd(REWARDS).expand(12)
    expected = (centred / (deviations + 1e-4)).numpy()
    options = PolicyConfig(advantage_std=scale)  # type: ignore[arg-type]
    # In any order: groups are by number.
    order = np.random.default_rng(0).permutation(12)
    rewards = REWARDS.numpy()[order]
    of_file = of_groups(rewards, GROUPS.numpy()[order], options)
    found = of_batch(of_file, rewards, options)
    # TRL's n / (n - 1) of a batch is a float32.
    limit = 1e-7 if scale == "batch" else 1e-12
    np.testing.assert_allclose(found, expected[order], rtol=0, atol=limit)


def test_other_means() -> None:
    rewards = np.array([1.0, 4.0, 2.5, 9.0])
    groups = np.array([0, 0, 0, 1])
    alone = PolicyConfig(advantage_mean="leave_one_out", advantage_std="none")
    expected = [1 - 6.5 / 2, 4 - 3.5 / 2, 2.5 - 2.5, 0]
    np.testing.assert_allclose(of_groups(rewards, groups, alone), expected)
    of_all = PolicyConfig(advantage_mean="batch", advantage_std="batch")
    found = of_batch(of_groups(rewards, groups, of_all), rewards, of_all)
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found, expected)
    plain = PolicyConfig(advantage_mean="none", advantage_std="none")
    np.testing.assert_array_equal(of_groups(rewards, groups, plain), rewards)


def test_what_is_dropped_still_counts_for_its_group() -> None:
    """Only a completion that nobody judged is no member of its group."""
    rewards = np.array([1.0, 0.0, math.nan, 2.0, 2.0, 5.0, 1.0])
    groups = np.array([0, 0, 0, 1, 1, 2, 2])
    cut = np.array([False, True, False, False, False, False, False])
    options = PolicyConfig(drop_even_groups=True, drop_truncated=True)
    found = credited(rewards, groups, np.full(7, 9), cut, options)
    assert found.keeps.tolist() == [True, False, False, False, False, True, True]
    assert found.advantages[0] == pytest.approx(0.5 / (stdev([1, 0]) + 1e-4))
    assert "1 without a reward were left out" in found.notes[0]
    assert "2 in 1 groups whose rewards are all alike" in found.notes[1]
    assert "1 that the length limit has cut were left out" in found.notes[2]
    kept = credited(rewards, groups, np.full(7, 9), cut, PolicyConfig())
    assert kept.keeps.sum() == 6 and "1 groups have rewards that are all alike" in kept.notes[1]


def test_completions_that_were_not_judged_are_left_out(tmp_path: Path) -> None:
    split = load(tmp_path, [ROW, OTHER, {**OTHER, "reward": None}, {**OTHER, "reward": True}])
    assert len(split.samples) == 3 and "1 without a reward" in split.summary()
    # A truth value is a reward, too.
    assert [s.value > 0 for s in split.samples] == [True, False, True]


def test_rollouts_are_stored_apart(tmp_path: Path) -> None:
    """The same rows may have been read as conversations before."""
    said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": said, "reward": i, "version": i} for i in range(3)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"train": str(tmp_path / "rows.jsonl"), "cache": str(tmp_path / "cache")}
    load_data(DataConfig(**options), make_tokenizer())
    split = load(tmp_path, rows, proximal="current")
    assert [sample.rollout.version for sample in split.samples] == [0, 1, 2]


def test_overlong_completions_lose_reward() -> None:
    """DAPO, equation 13, with a limit of 20 tokens and a cache of 8."""
    options = PolicyConfig(overlong_length=20, overlong_cache=8)
    found = overlong_penalty(np.array([5, 12, 13, 16, 20, 33]), options)
    assert found.tolist() == [0, 0, -1 / 8, -0.5, -1, -1]
    one = credited(
        np.array([1.0, 1.0]), np.zeros(2), np.array([12, 16]), np.zeros(2, bool), options
    )
    assert one.advantages[0] == -one.advantages[1] > 0 and one.rewards.tolist() == [1, 0.5]


def test_given_advantages_are_used(tmp_path: Path) -> None:
    of_row = without(ROW, "reward")
    split = load(tmp_path, [{**of_row, "advantage": -0.75}, {**of_row, "advantage": 2}])
    assert values_of(split) == [-0.75, 2]
    split = load(tmp_path, [{**of_row, "advantages": [1, 2, 3.5, -1]}])
    assert split.floats == ("logprobs", "advantages")
    assert split.samples[0].floats["advantages"][3:].tolist() == [1, 2, 3.5, -1]
    with pytest.raises(ValueError, match="advantage_std needs rewards, and .* has advantages"):
        load(tmp_path, [{**of_row, "advantage": 2}], advantage_std="none")


def test_other_rewards_and_options_are_other_samples(tmp_path: Path) -> None:
    """A resumed run must not go on with other advantages, or log-probabilities."""
    digests = set()
    variants: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}), ({"reward": 2.5, "group": 1}, {}), ({}, {"advantage_std": "none"}),
        ({"logprobs": [-1.5, -0.5, None, 0.0]}, {}), ({"mask": [1, 1, 1, 0]}, {}),
    ]  # fmt: skip
    for change, options in variants:
        rows = [{**ROW, "group": 1, **change}, {**OTHER, "group": 1}, {**OTHER, "group": 1}]
        split = load(tmp_path, rows, **options)
        digests.add(digest_of_samples(split.samples))
        assert digest_of_samples(list(split.samples)) == digest_of_samples(split.samples)
    assert len(digests) == len(variants)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [-1.0]}, "column 'logprobs' has 1 values for 4 completion tokens"),
        ({"logprobs": [-1, -1, 0.5, 0]}, "log-probabilities, which are not above 0, got 0.5"),
        ({"logprobs": [-1, -1, "a", 0]}, "'logprobs' must hold a number, got"),
        ({"logprobs": -1.0}, "'logprobs' must hold a list, one value for each completion token"),
        ({"mask": [1, 1, 2, 1]}, "column 'mask' must hold 0 or 1 for each token"),
        ({"mask": [1, 1]}, "column 'mask' has 2 values for 4 completion tokens"),
        ({"prompt_ids": []}, "must hold tokens: before a completion stands at least one"),
        ({"completion_ids": [1.5]}, "column 'completion_ids' must hold a list of token ids"),
        ({"completion_ids": [-1]}, "column 'completion_ids' must hold a list of token ids"),
        ({"completion_ids": "text"}, "column 'completion_ids' must hold a list of token ids"),
        ({"reward": "good"}, "column 'reward' must hold a number, got"),
        ({"reward": float("nan")}, "column 'reward' must hold a number, got"),
        ({"reward": 10**400}, "column 'reward' must hold a number, got"),
        ({"version": -1}, "column 'version' must hold a version, a number from 0 on"),
        ({"versions": [1, 2]}, "column 'versions' has 2 values for 4 completion tokens"),
        ({"versions": [1, 1, None, 1]}, "'versions' must hold a version for each token"),
        ({"versions": [1, 1, -2, 1]}, "'versions' must hold a version, a number from 0 on"),
        (
            {"version": 2, "versions": [1, 1, 2, 2]},
            "column 'version' says 2, and the oldest of 'versions' is 1",
        ),
        ({"truncated": "yes"}, "column 'truncated' must hold true or false"),
    ],
)
def test_what_is_refused_of_a_row(change: Any, message: str, tmp_path: Path) -> None:
    beside = {"mask": None, "version": 0, "versions": None, "truncated": None}
    with pytest.raises(ValueError, match=f"row 2: .*{message}"):
        load(tmp_path, [{**ROW, **beside}, {**ROW, **beside, **change}])


def test_columns_that_are_refused(tmp_path: Path) -> None:
    unsampled = without(ROW, "logprobs")
    with pytest.raises(ValueError, match="has no column logprobs, which .*proximal=engine"):
        load(tmp_path, [unsampled, {**unsampled, "reward": 0}])
    split = load(tmp_path, [unsampled, {**unsampled, "reward": 0}], proximal="start")
    assert len(split.samples) == 2
    with pytest.raises(ValueError, match="has no column proximal_logprobs, which .*=data"):
        load(tmp_path, [ROW, OTHER], proximal="data")
    unjudged = without(ROW, "reward")
    with pytest.raises(ValueError, match="found none of them among prompt_ids, completion_ids"):
        load(tmp_path, [unjudged])
    with pytest.raises(ValueError, match="row 2: column mask, version is not in the first row"):
        load(tmp_path, [ROW, {**OTHER, "mask": [1, 0], "version": 1}])
    with pytest.raises(ValueError, match="found reward and advantage among"):
        load(tmp_path, [{**ROW, "advantage": 1.0}])
    with pytest.raises(ValueError, match="every advantage is 0, so that nothing would be learned"):
        load(tmp_path, [ROW, {**OTHER, "reward": 1.0}])
    mapped = {"prompt_ids": "p", "completion_ids": "completion_ids", "reward": "score"}
    row = {"p": [5], "completion_ids": [6, 7], "score": 1.0, "reward": 9.0}
    rows = [row, {**row, "score": 0}]
    split = load(tmp_path, rows, data={"format": mapped}, proximal="current")
    assert split.unused_columns == ("reward",) and len(split.samples) == 2
    check_vocabulary(split, 8)
    with pytest.raises(ValueError, match="has token ids beyond the model's 7, up to 7, in 2 of"):
        check_vocabulary(split, 7)
