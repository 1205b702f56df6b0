"""What the ``rl`` section asks of the other sections."""

from typing import Protocol

from megalora.config.checkpoint import CheckpointConfig
from megalora.config.checks import require
from megalora.config.data import DataConfig
from megalora.config.lora import LoRAConfig
from megalora.config.objective import ObjectiveConfig
from megalora.config.parallel import ParallelConfig, check_generation
from megalora.config.rl import RLConfig
from megalora.config.train import TrainConfig


class Sections(Protocol):
    """The sections that are looked at: those of ``RunConfig``, which imports this module."""

    @property
    def rl(self) -> RLConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def objective(self) -> ObjectiveConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def lora(self) -> LoRAConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...


def check_rl(config: Sections) -> None:
    """Raise ``ValueError`` where other sections do not fit a run that samples its completions."""
    rl = config.rl
    require(
        config.objective.name == "grpo",
        f"rl.rewards needs objective.name=grpo, got {config.objective.name}: rewards are what it"
        " learns from",
    )
    require(
        rl.max_new_tokens < config.data.max_length,
        f"rl.max_new_tokens={rl.max_new_tokens} leaves no room for a prompt in"
        f" data.max_length={config.data.max_length}, which holds prompt and completion",
    )
    if not rl.is_served:
        # Stages and parts of rows have no cache to generate from; servers need none here.
        what = "sampling by the run's own model (rl.servers=[])"
        check_generation(config.parallel.pp, config.parallel.cp, what)
    else:
        _check_served(config)
    _check_steps(config)
    _check_policy(config)
    beside = "does not go with rl.rewards"
    require(config.train.relora is None, f"train.relora {beside}: nothing was compared with both")
    require(
        config.train.check_base != "loss",
        f"train.check_base=loss {beside}: there is no batch before the first completions are"
        " sampled; use train.check_base=layer",
    )
    require(
        config.lora.dropout == 0,
        f"lora.dropout {beside}: completions are sampled without dropout, so that ratios would"
        " compare two different models",
    )


def _check_served(config: Sections) -> None:
    """What vLLM cannot be given."""
    require(
        config.checkpoint.serve is None,
        "checkpoint.serve does not go with rl.servers, which get every version anyway: leave it"
        " out",
    )
    not_loaded = {
        "lora.use_dora": bool(config.lora.use_dora),
        "lora.lora_bias": config.lora.lora_bias,
    }
    not_loaded |= {f"lora.{option}": True for option in config.lora.whole_options}
    for option, is_set in not_loaded.items():
        require(
            not is_set,
            f"{option}: vLLM does not load it, so that rl.servers would sample from another"
            " adapter; sample from the model that is trained (neither rl.servers nor"
            " rl.start_servers)",
        )


def _check_steps(config: Sections) -> None:
    rl = config.rl
    train = config.train
    require(
        train.steps is not None and train.epochs is None,
        "rl.rewards needs train.steps, and no train.epochs: a run samples as many completions as"
        " its steps take",
    )
    require(
        train.global_batch_size % rl.group_size == 0,
        f"train.global_batch_size={train.global_batch_size} counts completions and must be a"
        f" multiple of rl.group_size={rl.group_size}, the completions of a prompt",
    )
    every = rl.steps_per_rollout
    # Between the steps on one rollout there is nothing to go on from: the rollouts would be lost.
    for name, value in (
        ("train.steps", train.steps or 0),
        ("train.eval_every", train.eval_every),
        ("checkpoint.every", config.checkpoint.every),
    ):
        # "auto" saves at any step.
        require(
            (1 if value == "auto" else value) % every == 0,
            f"{name}={value} must be a multiple of rl.steps_per_rollout={every}: a run evaluates,"
            " saves and stops where it would sample anew",
        )


def _check_policy(config: Sections) -> None:
    policy = config.objective.learned_policy
    assert policy is not None, "the objective is grpo"
    meant = {
        "data": "there is no file of rollouts with proximal_logprobs",
        "start": "it is the adapter that the whole run began with",
    }
    require(
        not (config.lora.use_dora and policy.proximal == "recompute"),
        "objective.policy.proximal=recompute does not go with lora.use_dora, whose norms an earlier"
        " adapter would need as well: use engine",
    )
    require(
        policy.proximal not in meant,
        f"objective.policy.proximal={policy.proximal} does not go with rl.rewards:"
        f" {meant.get(policy.proximal)}; use engine, or recompute for the adapter that a rollout"
        " was sampled with",
    )
