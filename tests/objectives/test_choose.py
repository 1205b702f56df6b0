"""What a config's objective section becomes, and what it refuses."""

import math

import pytest

from megalora.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from megalora.config.policy import PolicyConfig
from megalora.config.train import Relora
from megalora.model.divergence import Divergence
from megalora.objectives.choose import objective_of
from megalora.objectives.distill import Distill
from megalora.objectives.kto import KTO
from megalora.objectives.policy import Policy
from megalora.objectives.preference import Preference
from megalora.objectives.scored import Classify, Reward
from megalora.objectives.sft import SFT


def config(train: dict | None = None, data: dict | None = None, **objective) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="-"),
        data=DataConfig(**{"train": "-", **(data or {})}),
        train=TrainConfig(**{"steps": 1, **(train or {})}),
        objective=ObjectiveConfig(**objective),
    )


def test_defaults_are_those_of_the_papers_and_of_trl() -> None:
    assert objective_of(config(train={"z_loss": 1e-4})) == SFT(z_loss=1e-4)
    assert objective_of(config(name="dpo")) == Preference("sigmoid", beta=0.1)
    assert objective_of(config(name="simpo")) == Preference("simpo", beta=2.0, margin=0.5)
    assert objective_of(config(name="orpo")) == Preference("orpo", beta=0.1, sft_weight=1.0)


def test_options_reach_the_objective() -> None:
    found = objective_of(
        config(name="dpo", loss="robust", beta=0.3, label_smoothing=0.1, sft_weight=0.2)
    )
    assert found == Preference("robust", beta=0.3, label_smoothing=0.1, sft_weight=0.2)
    of_start = objective_of(config(name="dpo", reference="start"))
    assert of_start == Preference("sigmoid", reference="start")
    assert [reference.model for reference in of_start.references] == ["start"]
    assert [reference.model for reference in found.references] == ["base"]
    assert objective_of(config(name="simpo", margin=0.0)) == Preference("simpo", beta=2.0)
    assert objective_of(config(name="kto")) == KTO()
    assert objective_of(
        config(name="kto", beta=0.3, desirable_weight=2, undesirable_weight=0.5, reference="start")
    ) == KTO(beta=0.3, good_weight=2, bad_weight=0.5, reference="start")
    assert objective_of(config(name="reward", centre=0.2)) == Reward(centre=0.2)
    assert objective_of(config(name="classify", labels=["a", "b"])) == Classify(2)
    taught = objective_of(
        config(name="distill", teacher="-", divergence="jsd", beta=0.3, temperature=2, sft_weight=1)
    )
    assert taught == Distill(Divergence("jsd", 0.3, 2), sft_weight=1)
    by_default = objective_of(config(name="distill", teacher="a"))
    assert by_default == Distill(Divergence("forward"), sft_weight=0)
    options = PolicyConfig(loss="gspo", kl_coef=0.1)
    learned = objective_of(config(name="grpo", policy=options, reference="start"))
    assert learned == Policy(options, "start")
    assert objective_of(config(name="grpo")) == Policy(PolicyConfig())
    # Without a reference there is no pass for it.
    assert [bool(objective_of(config(name=n)).references) for n in ("dpo", "simpo", "orpo")] == [
        True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, "objective.beta=0.1 does nothing for objective.name=sft"),
        ({"name": "dpo", "margin": 0.5}, "margin=0.5 does nothing for objective.name=dpo"),
        ({"name": "orpo", "label_smoothing": 0.1}, "does nothing for objective.name=orpo"),
        ({"name": "simpo", "reference": "start"}, "reference=start does nothing for .*name=simpo"),
        ({"name": "simpo", "loss": "ipo"}, "loss=ipo does nothing for objective.name=simpo"),
        ({"name": "dpo", "loss": "ipo", "label_smoothing": 0.1}, "nothing for objective.loss=ipo"),
        ({"name": "dpo", "desirable_weight": 2}, "nothing for objective.name=dpo"),
        ({"name": "kto", "loss": "ipo"}, "loss=ipo does nothing for objective.name=kto"),
        ({"name": "kto", "undesirable_weight": -1}, "undesirable_weight must not be negative"),
        (
            {"name": "kto", "train": {"global_batch_size": 1}},
            "kto needs train.global_batch_size of at least 2, got 1: it pairs each prompt",
        ),
        ({"name": "kto", "data": {"eval": 1}}, "kto needs data.eval of at least 2 samples, got 1"),
        ({"name": "kto", "data": {"too_long": "split"}}, "split would make several answers of one"),
        ({"name": "kto", "train": {"z_loss": 0.1}}, "train.z_loss is a term of sup"),
        (
            {"name": "distill"},
            "needs objective.teacher: the folder or hub name of a model, or base",
        ),
        ({"teacher": "base"}, "teacher=base does nothing for objective.name=sft"),
        (
            {"name": "dpo", "temperature": 2.0},
            "temperature=2.0 does nothing for objective.name=dpo",
        ),
        (
            {"name": "distill", "teacher": "base"},
            "base needs objective.sft_weight above 0: the model",
        ),
        ({"name": "distill", "teacher": "a", "beta": 0.5}, "nothing for objective.div.*forward"),
        (
            {"name": "distill", "teacher": "a", "divergence": "jsd", "beta": 1.0},
            "beta=1.0 must be below 1",
        ),
        ({"name": "distill", "teacher": "a", "temperature": 0.0}, "must be above 0, got 0.0"),
        (
            {"name": "distill", "teacher": "a", "train": {"z_loss": 0.1}},
            "train.z_loss is a term of sup",
        ),
        (
            {
                "name": "distill",
                "teacher": "base",
                "sft_weight": 0.1,
                "train": {"relora": Relora(every=1), "steps": 2},
            },
            "compares with the base, into which train.relora merges",
        ),
        ({"name": "dpo", "beta": 0.0}, "objective.beta must be above 0, got 0.0"),
        ({"name": "dpo", "beta": float("nan")}, "objective.beta must be above 0, got nan"),
        ({"name": "dpo", "sft_weight": -1.0}, "sft_weight must not be negative, got -1.0"),
        ({"name": "dpo", "label_smoothing": 0.5}, "must be in .0, 0.5., got 0.5: at a half"),
        ({"name": "dpo", "train": {"z_loss": 0.1}}, "train.z_loss is a term of sup"),
        ({"name": "orpo", "train": {"label_smoothing": 0.1}}, "train.label_smoothing is a term"),
        ({"name": "dpo", "data": {"too_long": "split"}}, "too_long=split would cut one answer"),
        ({"policy": PolicyConfig()}, "policy=.* does nothing for objective.name=sft"),
        ({"name": "grpo", "beta": 0.1}, "beta=0.1 does nothing for objective.name=grpo"),
        (
            {"name": "grpo", "reference": "start"},
            "reference=start does nothing .* without obj.*kl_",
        ),
        ({"name": "grpo", "data": {"too_long": "split"}}, "would give a part of a completion the"),
        ({"name": "grpo", "train": {"label_smoothing": 0.1}}, "train.label_smoothing is a term"),
        ({"name": "classify"}, "needs objective.labels, the names of the labels, or objective.num"),
        ({"name": "classify", "num_labels": 0}, "num_labels must be from 1 to 1,048,576, got 0"),
        ({"name": "classify", "labels": ["one"]}, "two or more different names, got .'one'."),
        ({"name": "classify", "labels": ["a", "a"]}, "two or more different names"),
        ({"name": "classify", "labels": ["a", "b"], "num_labels": 3}, "3 is not the number of obj"),
        ({"name": "classify", "num_labels": 2, "beta": 1.0}, "reads num_labels, labels"),
        ({"name": "reward", "num_labels": 2}, "num_labels=2 does nothing for objective.name=rew"),
        ({"name": "reward", "centre": -1.0}, "objective.centre must not be negative, got -1.0"),
        ({"name": "reward", "data": {"too_long": "truncate_left"}}, "would cut one answer of a p"),
        (
            {"name": "classify", "num_labels": 2, "data": {"too_long": "truncate_right"}},
            "cut off the end of a text, from which objective.name=classify reads its score",
        ),
        (
            {"name": "classify", "num_labels": 2, "train": {"check_base": "loss"}},
            "train.check_base=loss needs the head of a language model",
        ),
        ({"name": "classify", "num_labels": 2, "train": {"z_loss": 0.1}}, "train.z_loss is a term"),
        (
            {
                "name": "classify",
                "num_labels": 2,
                "data": {"max_length": 100},
                "train": {"micro_batch_tokens": 99},
            },
            "has no room for a sample .* at least 100",
        ),
        (
            {"name": "dpo", "data": {"max_length": 100}, "train": {"micro_batch_tokens": 197}},
            "micro_batch_tokens=197 has no room for a pair of sequences .* at least 198",
        ),
    ],
)
def test_what_means_nothing_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_pair_of_the_longest_sequences_fits_its_row() -> None:
    config(name="dpo", data={"max_length": 100}, train={"micro_batch_tokens": 198})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": "cispo", "clip_low": 0.1},
            "clip_low=0.1 does nothing for .*loss=cispo; clip and",
        ),
        ({"sapo": [1.0, 2.0]}, "sapo=.* does nothing for objective.policy.loss=clip; sapo read"),
        ({"loss": "sapo", "sapo": [1.0]}, "sapo must be two numbers above 0, got .1.0."),
        ({"loss": "vespo", "vespo_bad": [1.0, -1.0]}, "vespo_bad must be two numbers above 0"),
        ({"clip_low": 1.5}, "clip_low must be at most 1, got 1.5: ratios are above 0"),
        ({"clip_high": 0.0}, "clip_high must be above 0, got 0.0"),
        ({"dual_clip": 0.9}, "dual_clip is a ratio above 1, got 0.9"),
        ({"loss": "gspo", "dual_clip": 3.0}, "dual_clip=3.0 does nothing for .*loss=gspo"),
        ({"ratio_cap": float("nan")}, "ratio_cap is a ratio above 1, got nan"),
        ({"reduction": "constant"}, "constant needs objective.policy.reduction_length"),
        ({"reduction_length": 9}, "no other reduction reads it; they are None and 9"),
        ({"loss": "gmpo", "reduction": "token"}, "reduction=token: gmpo has one ratio for a seq"),
        ({"mismatch": "token"}, "mismatch=token does nothing for .*proximal=engine, whose ratios"),
        ({"mismatch_upper": 2.0}, "do nothing for objective.policy.mismatch=off; set it to token"),
        (
            {"proximal": "data", "mismatch": "token", "mismatch_lower": 4.0},
            "mismatch_lower must be from 0 to below mismatch_upper, got 4.0 and 3.0",
        ),
        (
            {"loss": "vespo", "proximal": "data", "mismatch": "sequence"},
            "mismatch=sequence: vespo multiplies weights over the sequence by itself",
        ),
        ({"drop_gap": 1.0}, "drop_gap is between 0 and 1, got 1.0: it is a difference"),
        ({"drop_divergence": -1.0}, "drop_divergence must not be negative, got -1.0"),
        ({"kl_coef": -0.1}, "kl_coef must not be negative, got -0.1"),
        ({"temperature": 0}, "objective.policy.temperature must be above 0, got 0"),
        ({"temperature": math.inf}, "objective.policy.temperature must be above 0, got inf"),
        ({"kl": "k2"}, "kl=k2, kl_corrected=false: without objective.policy.kl_coef above 0"),
        ({"kl": "k1", "kl_coef": 0.1}, "kl=k1 needs objective.policy.kl_corrected=true: without"),
        ({"advantage_mean": "batch"}, "advantage_std=group: .* batch or none"),
        ({"advantage_epsilon": -1.0}, "advantage_epsilon must not be negative, got -1.0"),
        ({"overlong_length": 9}, "overlong_length and overlong_cache belong together, got 9 and"),
        (
            {"overlong_length": 9, "overlong_cache": 12},
            "must be from 1 to overlong_length=9, got 12",
        ),
    ],
)
def test_policy_options_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**options)


def test_null_stands_for_what_the_papers_have() -> None:
    assert PolicyConfig().clips == (0.2, 0.2) and PolicyConfig().reduced_by == "token"
    assert PolicyConfig(clip_high=0.28).clips == (0.2, 0.28)
    assert PolicyConfig(loss="gspo").clips == (3e-4, 4e-4)
    assert PolicyConfig(loss="gspo").reduced_by == "sequence"
    assert PolicyConfig().cap is None and PolicyConfig(loss="cispo").cap == 5.0
    assert PolicyConfig(loss="gmpo").clips == (0.4, 0.4)
