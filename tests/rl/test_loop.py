"""A run that samples what it learns from."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalora.adapters.files import WEIGHTS
from megalora.config import RunConfig
from megalora.data.batch import Batch
from megalora.rl import embedded
from megalora.rl.batches import MakePlay, PlayWith, SampledBatches
from megalora.rl.embedded import Embedded
from megalora.rl.episode import Ask, Episode, Prompt, Sampled
from megalora.rl.feed import sampling_feed
from megalora.rl.rollouts import FOLDER, REST, ROUNDS
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.jsonl import column, read_jsonl
from tests.oracles.training import frozen
from tests.parity.runs import records
from tests.rl import played
from tests.rl.played import LOW, rl_config, train_by_ids, write_prompts


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    return read_jsonl(run / FOLDER / f"step_{step:06}.jsonl")


def test_each_step_learns_from_what_the_adapter_before_it_has_sampled(
    tiny: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    config = rl_config(tiny, prompts, tmp_path / "run", eval_every=2)
    run_ranks(train_by_ids, 1, config)
    asked: list[int] = []
    for step in range(4):
        rows = rollouts(tmp_path / "run", step)
        assert column(rows, "version") == [step] * 8
        groups = column(rows, "group")
        assert groups == [2 * step] * 4 + [2 * step + 1] * 4
        for row in rows:
            low = [token < LOW for token in row["completion_ids"]]
            assert row["reward"] == sum(low) / len(low) and len(low) == len(row["logprobs"])
        asked.append(groups[0])
    assert records(tmp_path / "run", "reward")[0] == pytest.approx(
        sum(column(rollouts(tmp_path / "run", 0), "reward")) / 8
    )
    # The engine is the model: what lies between them is rounding.
    assert max(records(tmp_path / "run", "engine_gap_max")) < 1e-5
    assert records(tmp_path / "run", "ratio") == pytest.approx([1] * 4, abs=1e-5)
    # No two completions are drawn alike, and each is an answer to its own prompt.
    first = rollouts(tmp_path / "run", 0)
    assert len({tuple(row["completion_ids"]) for row in first}) == 8
    assert len({tuple(row["prompt_ids"]) for row in first}) == 2
    # Of three prompts that were held out, before, within and after.
    rewards = records(tmp_path / "run", "eval_reward")
    assert len(rewards) == 3
    assert records(tmp_path / "run", "eval_loss") == [-reward for reward in rewards]


@pytest.mark.slow
def test_completions_are_sampled_and_learned_at_a_temperature(tiny: Path, tmp_path: Path) -> None:
    """Against transformers' logits / T; the adapter of the first round is still the base."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    temperature = 1.7
    policy = {"temperature": temperature, "kl_coef": 0.1}
    run_ranks(train_by_ids, 1, rl_config(tiny, prompts, tmp_path / "run", policy, steps=3))
    model = frozen(tiny, torch.float64)
    entropies: list[float] = []
    for row in rollouts(tmp_path / "run", 0):
        count = len(row["completion_ids"])
        tokens = torch.tensor([*row["prompt_ids"], *row["completion_ids"]])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, -count - 1 : -1]
        expected = (logits / temperature).log_softmax(-1)
        entropies += [-(of_token.exp() * of_token).sum().item() for of_token in expected]
        expected = expected.gather(1, tokens[-count:, None])[:, 0].tolist()
        assert row["logprobs"] == pytest.approx(expected, abs=1e-5)
    found = records(tmp_path / "run", "entropy")
    assert found[0] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    # What is trained and what is compared with have the same temperature.
    assert max(records(tmp_path / "run", "engine_gap_max")) < 1e-5
    assert records(tmp_path / "run", "kl")[0] < 1e-6


def stale(config: RunConfig) -> None:
    """An engine whose log-probabilities are of something else; a rank function."""
    sample = Embedded.sample

    async def other(self: Embedded, tokens: Any, stream: int, temperature: float) -> Sampled:
        sampled = await sample(self, tokens, stream, temperature)
        return replace(sampled, logprobs=[logprob - 1e-4 for logprob in sampled.logprobs])

    Embedded.sample = other  # type: ignore[method-assign]
    train_by_ids(config)


@pytest.mark.slow
def test_an_engine_with_another_adapter_stops_the_run(tiny: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    config = rl_config(tiny, prompts, tmp_path / "run", steps=1)
    with pytest.raises(Exception, match=r"step 1: the engine and this model differ by 1.0e-04 on"):
        run_ranks(stale, 1, config)
    # A limit of the user's own counts instead.
    config = replace(config, rl=replace(config.rl, largest_gap=2e-4))
    run_ranks(stale, 1, config)
    assert records(tmp_path / "run", "engine_gap") == pytest.approx([1e-4], rel=0.02)


@asynccontextmanager
async def at_first_alike(config: RunConfig) -> AsyncIterator[PlayWith]:
    """As ``by_ids``, with a reward of 0 for everything that the first adapter samples."""
    async with played.by_ids(config) as play_with:

        async def play(prompt: Prompt, place: int, ask: Ask) -> Episode:
            episode = await play_with(prompt, place, ask)
            return replace(episode, reward=0.0) if episode.versions[0] == 0 else episode

        yield play


def train_at_first_alike(config: RunConfig) -> Path | None:
    return train(config, feed=sampling_feed(at_first_alike))


@pytest.mark.parametrize(
    "balance", [0.0, pytest.param(0.01, marks=pytest.mark.slow)], ids=["", "balanced"]
)
def test_a_first_step_whose_rewards_are_alike_learns_nothing(
    balance: float, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And ends no run: nothing is wrong where hard prompts are all failed. With a balance loss all
    layers but the last one have a gradient."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    config = rl_config(tiny, prompts, tmp_path / "run", steps=3, router_aux_loss_coef=balance)
    run_ranks(train_at_first_alike, 1, config)
    norms = records(tmp_path / "run", "grad_norm")
    assert (norms[0] > 0) == (balance > 0) and min(norms[1:]) > 0
    # It is said of this step, and of no other.
    said = capfd.readouterr().out
    assert said.count("nothing is learned") == 1
    assert re.search(r"^rl: step 1: .* nothing is learned \(rounds in a row: 1\)", said, re.M)


def alike(config: RunConfig) -> None:
    """Rewards that teach nothing; a rank function."""
    score = played.LOW
    # Above every token id.
    played.LOW = 10**6
    try:
        train_by_ids(config)
    finally:
        played.LOW = score


@pytest.mark.slow
def test_what_ends_a_run_can_be_read(tiny: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    policy = {"drop_even_groups": True}
    config = rl_config(tiny, prompts, tmp_path / "run", policy, steps=1, eval=1)
    with pytest.raises(Exception, match="41 prompts in a row have completions of which nothing"):
        run_ranks(alike, 1, config)
    rows = read_jsonl(tmp_path / "run" / FOLDER / REST)
    assert len(rows) == 41 * 4 and {row["reward"] for row in rows} == {1.0}
    assert not any(column(rows, "trained"))
    assert sorted(set(column(rows, "group"))) == list(range(41))
    # Nothing of it is done with.
    assert not (tmp_path / "run" / FOLDER / ROUNDS).exists()


@asynccontextmanager
async def told_to_stop(config: RunConfig) -> AsyncIterator[PlayWith]:
    """Like ``by_ids``; in the second round this process is told to stop, and one group waits."""
    async with played.by_ids(config) as play:

        async def stopping(prompt: Prompt, place: int, ask: Ask) -> Episode:
            if prompt.number == 3:
                if place == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(600)
            return await play(prompt, place, ask)

        yield stopping


def stopped(config: RunConfig, told: MakePlay) -> str:
    """Name of the last checkpoint of a run whose episodes are played so; a rank function."""
    embedded.MEET_S = 0.2
    saved = train(config, feed=sampling_feed(told))
    return saved.name if saved else ""


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_leaves_its_rollout(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    config = rl_config(tiny, prompts, tmp_path / "run", steps=2, eval=1)
    # The rollout would take ten minutes; what was trained is saved.
    assert run_ranks(stopped, 1, config, told_to_stop) == ["step_000001"]
    assert "stopped by a signal at step 1" in capfd.readouterr().out
    on = replace(config, checkpoint=replace(config.checkpoint, resume=True))
    run_ranks(train_by_ids, 1, on)
    # Prompts that were begun are asked again, and nothing tells it from a run that never stopped.
    through = rl_config(tiny, prompts, tmp_path / "through", steps=2, eval=1)
    run_ranks(train_by_ids, 1, through)
    assert rollouts(tmp_path / "run", 1) == rollouts(tmp_path / "through", 1)


@asynccontextmanager
async def told_to_stop_in_an_evaluation(config: RunConfig) -> AsyncIterator[PlayWith]:
    """Like ``by_ids``; this process is told to stop by the completion of the evaluation at step 1,
    which waits."""
    asked = 0
    async with played.by_ids(config) as play:

        async def stopping(prompt: Prompt, place: int, ask: Ask) -> Episode:
            nonlocal asked
            asked += 1
            # One at step 0 and eight in the round before it.
            if asked == 10:
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(600)
            return await play(prompt, place, ask)

        yield stopping


def evaluations(run: Path) -> list[tuple[int, float]]:
    """(step, reward) of each evaluation."""
    rows = read_jsonl(run / "metrics.jsonl")
    return [(row["step"], row["eval_reward"]) for row in rows if "eval_reward" in row]


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_leaves_its_evaluation(tiny: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    config = rl_config(tiny, prompts, tmp_path / "run", steps=2, eval=1, eval_every=1)
    assert run_ranks(stopped, 1, config, told_to_stop_in_an_evaluation) == ["step_000001"]
    assert [step for step, _ in evaluations(tmp_path / "run")] == [0]
    on = replace(config, checkpoint=replace(config.checkpoint, resume=True))
    run_ranks(train_by_ids, 1, on)
    # The resumed run makes up for it.
    through = rl_config(tiny, prompts, tmp_path / "through", steps=2, eval=1, eval_every=1)
    run_ranks(train_by_ids, 1, through)
    found = evaluations(tmp_path / "run")
    assert [step for step, _ in found] == [0, 1, 2]
    assert found == evaluations(tmp_path / "through")


def rows_of_both_steps(config: RunConfig) -> list[set[tuple[int, ...]]]:
    """Of the two steps of a rollout, the tokens of its sequences; a rank function."""
    found: list[set[tuple[int, ...]]] = []
    of_step = SampledBatches.of_step

    def kept(self: SampledBatches, step: int) -> list[Batch]:
        rows = of_step(self, step)
        sequences: set[tuple[int, ...]] = set()
        for row in rows:
            for start, end in pairwise(row.ends[: row.num_sequences + 1]):
                sequences.add((*row.tokens[start:end].tolist(), int(row.labels[end - 1])))
        found.append(sequences)
        return rows

    SampledBatches.of_step = kept  # type: ignore[method-assign]
    train_by_ids(config)
    return found


def test_the_second_step_has_completions_of_its_own(tiny: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    config = rl_config(tiny, prompts, tmp_path / "run", steps=2, rl={"steps_per_rollout": 2})
    (steps,) = run_ranks(rows_of_both_steps, 1, config)
    rows = rollouts(tmp_path / "run", 0)
    every = [(*row["prompt_ids"], *row["completion_ids"]) for row in rows]
    assert steps == [set(every[:8]), set(every[8:])] and len(set(every)) == 16


@pytest.mark.slow
@pytest.mark.parametrize("drops", [False, True])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    drops: bool, tiny: Path, tmp_path: Path
) -> None:
    """With groups left out, where it goes on does not follow from the step alone."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    options: dict[str, Any] = {
        "policy": {"drop_even_groups": drops, "proximal": "recompute"},
        "rl": {"steps_per_rollout": 2, "max_new_tokens": 2 if drops else 4},
    }
    through = rl_config(tiny, prompts, tmp_path / "through", steps=8, **options)
    run_ranks(train_by_ids, 1, through)
    half = rl_config(tiny, prompts, tmp_path / "half", steps=4, **options)
    run_ranks(train_by_ids, 1, half)
    # A later process that was killed before its checkpoint leaves rollouts behind.
    rounds = tmp_path / "half" / FOLDER / ROUNDS
    with rounds.open("a") as file:
        file.write('{"round": 2, "step": 4, "prompts": [900, 901]}\n{"round": 3, "st')
    on = rl_config(tiny, prompts, tmp_path / "half", steps=8, **options)
    on = replace(on, checkpoint=replace(on.checkpoint, resume=True))
    run_ranks(train_by_ids, 1, on)
    for step in range(0, 8, 2):
        expected = rollouts(tmp_path / "through", step)
        assert rollouts(tmp_path / "half", step) == expected
        # A rollout has the completions of two steps.
        assert sum(column(expected, "trained")) == 16
    assert any(len(rollouts(tmp_path / "half", s)) > 16 for s in range(0, 8, 2)) == drops
    done = column(read_jsonl(rounds), "prompts")
    assert done == column(read_jsonl(tmp_path / "through" / FOLDER / ROUNDS), "prompts")
    # The second step on a rollout is off the policy, and compares with the first step's adapter.
    ratios = records(tmp_path / "half", "ratio")
    assert ratios[::2] == pytest.approx([1] * 4, abs=1e-5)
    assert all(abs(ratio - 1) > 1e-4 for ratio in ratios[1::2])
    ours = load_file(tmp_path / "half" / "step_000008" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "through" / "step_000008" / WEIGHTS).items():
        assert ours[name].equal(tensor), name
    # Without the record of its rollouts it goes on behind as many prompts as it must have asked.
    (tmp_path / "half" / FOLDER).rename(tmp_path / "elsewhere")
    last = replace(on, train=replace(on.train, steps=10))
    run_ranks(train_by_ids, 1, last)
    assert min(row["group"] for row in rollouts(tmp_path / "half", 8)) == 4 * 4
    other = replace(last, rl=replace(on.rl, group_size=8))
    with pytest.raises(Exception, match="was trained with rl.group_size=4, this run has 8"):
        run_ranks(train_by_ids, 1, other)
