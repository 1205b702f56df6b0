"""Make the objective that a config names."""

from dataclasses import replace

from megalora.config import ObjectiveConfig, RunConfig, TrainConfig
from megalora.model.divergence import Divergence
from megalora.objectives.distill import Distill
from megalora.objectives.kto import KTO
from megalora.objectives.objective import Objective
from megalora.objectives.policy import Policy
from megalora.objectives.preference import Preference
from megalora.objectives.scored import Classify, Reward
from megalora.objectives.sft import SFT


def objective_of(config: RunConfig) -> Objective:
    """What ``objective`` describes, with null replaced by what its docstrings say."""
    options = config.objective
    if options.name == "sft":
        return sft_of(config.train)
    if options.name == "kto":
        return KTO(
            beta=0.1 if options.beta is None else options.beta,
            good_weight=options.desirable_weight,
            bad_weight=options.undesirable_weight,
            reference=options.reference,
        )
    if options.name == "classify":
        return Classify(options.num_scores)
    if options.name == "distill":
        return distill_of(options)
    if (policy := options.learned_policy) is not None:
        # On rollouts of a single step that adapter is the current one, which needs no pass.
        if policy.proximal == "recompute" and config.rl.steps_per_rollout == 1:
            policy = replace(policy, proximal="current")
        return Policy(policy, options.reference)
    if options.name == "reward":
        return Reward(options.centre or 0.0)
    # As TRL has it; but for SimPO, whose paper has 2 to 2.5 and scales means by it, not sums.
    beta = 2.0 if options.name == "simpo" else 0.1
    # ORPO's loss has the cross entropy as a part of it.
    sft_weight = 1.0 if options.name == "orpo" else 0.0
    margin = 0.5 if options.name == "simpo" else 0.0
    return Preference(
        kind=options.loss if options.name == "dpo" else options.name,
        beta=beta if options.beta is None else options.beta,
        label_smoothing=options.label_smoothing,
        sft_weight=sft_weight if options.sft_weight is None else options.sft_weight,
        margin=margin if options.margin is None else options.margin,
        reference=options.reference,
    )


def sft_of(train: TrainConfig) -> SFT:
    """Supervised fine-tuning with the terms that ``train`` adds."""
    return SFT(z_loss=train.z_loss, label_smoothing=train.label_smoothing)


def distill_of(options: ObjectiveConfig) -> Distill:
    """Distillation with the distance that the options name."""
    beta = 0.5 if options.beta is None else options.beta
    divergence = Divergence(options.divergence, beta, options.temperature)
    return Distill(divergence, options.sft_weight or 0.0)
