"""A complete config: all sections, and the checks that depend on the number of ranks."""

from dataclasses import dataclass, field

from megalora.config.checkpoint import CheckpointConfig
from megalora.config.checks import require
from megalora.config.data import DataConfig
from megalora.config.log import LogConfig
from megalora.config.lora import LoRAConfig
from megalora.config.model import ModelConfig
from megalora.config.objective import ObjectiveConfig
from megalora.config.parallel import ParallelConfig, check_generation
from megalora.config.rl import RLConfig
from megalora.config.rl_checks import check_rl
from megalora.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    rl: RLConfig = field(default_factory=RLConfig)

    def __post_init__(self) -> None:
        # Here and not in a section: it takes two of them to see it.
        capacity = self.train.micro_batch_tokens
        # The two of a pair share a row.
        places = self.data.max_length - self.objective.unread_tokens
        needed = self.objective.sequences * places
        sample = "a pair of sequences" if self.objective.pairs else "a sample"
        require(
            capacity is None or capacity >= needed,
            f"train.micro_batch_tokens={capacity} has no room for {sample} of"
            f" data.max_length={self.data.max_length} tokens. Lower data.max_length, or set"
            f" train.micro_batch_tokens to at least {needed}.",
        )
        require(
            not (self.data.weights and self.train.steps is None),
            "train.epochs has no meaning where data.train has weights: each source is repeated at a"
            " rate of its own. Set train.steps, or leave the weights out to train on every sample"
            " once an epoch.",
        )
        if self.objective.name != "sft":
            self._check_answers()
        # Without lm_head nothing has log-probabilities.
        if self.objective.num_scores:
            self._check_scored()
        if self.lora.use_dora:
            self._check_dora()
        if self.train.relora is not None:
            self._check_relora()
        if self.lora.init != "lora":
            self._check_init()
        if self.lora.lora_bias:
            self._check_bias()
        has_whole = bool(self.lora.whole_options)
        require(
            self.train.saved_lr_ratio == 1 or has_whole or self.objective.num_scores > 0,
            f"train.saved_lr_ratio={self.train.saved_lr_ratio:g} is of what is trained whole, and"
            " this config has nothing such (lora.modules_to_save, lora.trainable_token_indices,"
            " lora.bias, a score head); leave it out",
        )
        for option in self.lora.whole_options:
            self._check_whole(option)
        if self.rl.is_on:
            check_rl(self)
        policy = self.objective.learned_policy
        require(
            self.rl.is_on or policy is None or policy.proximal != "recompute",
            "objective.policy.proximal=recompute needs completions that the run samples itself"
            " (rl.rewards); for those of a file use start or data",
        )

    def _check_whole(self, option: str) -> None:
        """What cannot be had with weights of the base that are trained themselves."""
        require(
            self.train.relora is None,
            f"lora.{option}: train.relora reads the base from disk again, without what is trained"
            " of it. Train without one of the two",
        )
        require(
            self.checkpoint.serve is None,
            f"checkpoint.serve: vLLM does not load lora.{option}. Train without one of the two, or"
            " merge checkpoints into the base: megalora merge",
        )
        # Nothing was compared with PEFT's of both.
        require(
            not self.objective.num_scores,
            f"objective.name={self.objective.name} trains a score head, which is not there with"
            f" lora.{option} yet: leave it out",
        )

    def _check_bias(self) -> None:
        """What cannot be had with biases of B."""
        require(
            self.train.relora is None,
            "lora.lora_bias: train.relora adds up B A of its cycles, which leaves biases out. Train"
            " without one of the two",
        )
        require(
            self.checkpoint.serve is None,
            "checkpoint.serve: vLLM does not load lora_bias. Train without one of the two, or merge"
            " checkpoints into the base: megalora merge",
        )

    def _check_init(self) -> None:
        """What cannot be had with an adapter that is initialised from the base weights."""
        init = f"lora.init={self.lora.init}"
        require(
            self.train.relora is None,
            f"{init}: train.relora begins anew with every cycle, from a base that the cycles before"
            " have changed. Train without one of the two",
        )
        require(
            not self.train.weight_decay,
            f"{init}: train.weight_decay={self.train.weight_decay:g} would decay the differences of"
            " A and B to their initial values, and not A and B. Set it to 0",
        )
        require(
            not self.train.ema_decay,
            f"{init}: train.ema_decay averages A and B apart, which are far from zero from the"
            " start. Train without one of the two",
        )

    def _check_dora(self) -> None:
        """Options that need adapters to be ``W + s B A``."""
        require(
            self.checkpoint.serve is None,
            "checkpoint.serve: vLLM does not load DoRA (lora.use_dora). Train without one of the"
            " two, or merge checkpoints into the base: megalora merge",
        )
        require(
            not self.objective.holds_start,
            "objective.reference=start, or objective.policy.proximal=start, compares with the run's"
            " first adapter, whose norms lora.use_dora would need as well: leave start or use_dora"
            " out",
        )
        # Nothing was compared with PEFT's of both.
        require(
            not self.objective.num_scores,
            f"objective.name={self.objective.name} trains a score head, which is not there with"
            " lora.use_dora yet: leave use_dora out",
        )
        require(
            self.train.relora is None,
            "lora.use_dora: train.relora adds up B A of its cycles, which leaves DoRA's magnitudes"
            " out. Train without one of the two",
        )
        require(
            not self.train.ema_decay,
            "lora.use_dora: train.ema_decay averages A and B, and no average of magnitudes belongs"
            " to the norms of those. Train without one of the two",
        )

    def _check_relora(self) -> None:
        """What cannot be had together with periodic merges."""
        require(
            not self.objective.num_references,
            f"objective.name={self.objective.name} compares with the base, into which train.relora"
            " merges adapters: leave one of them out",
        )
        require(
            not self.objective.num_scores,
            f"objective.name={self.objective.name}: train.relora merges adapters and has no place"
            " for a score head. Leave one of the two out",
        )
        require(
            not self.lora.share_outer,
            "lora.share_outer: train.relora merges a pair of factors for each expert, and experts"
            " would share some of them. Leave one of the two out",
        )
        # vLLM sets aside room for the largest rank when it starts.
        require(
            self.checkpoint.serve is None,
            "checkpoint.serve: with train.relora an adapter's rank grows with every cycle, for"
            " which a server that runs has no room. Serve the last checkpoint instead",
        )

    def _check_answers(self) -> None:
        """What means nothing where whole answers are judged."""
        name = self.objective.name
        for option in ("z_loss", "label_smoothing"):
            require(
                not getattr(self.train, option),
                f"train.{option} is a term of supervised fine-tuning: leave it out with"
                f" objective.name={name}",
            )
        require(
            not self.objective.pairs or self.data.too_long == "left_out",
            f"data.too_long={self.data.too_long} would cut one answer of a pair and not the other;"
            f" with objective.name={name} it must be left_out",
        )
        if self.objective.learned_policy is not None:
            self._check_rollouts()
        if not self.objective.labelled:
            return
        require(
            self.data.too_long != "split",
            "data.too_long=split would make several answers of one label; with"
            f" objective.name={name} it can be left_out, truncate_right or truncate_left",
        )
        other = "it pairs each prompt with the answer to another one of its batch"
        require(
            self.train.global_batch_size >= 2,
            f"objective.name={name} needs train.global_batch_size of at least 2, got"
            f" {self.train.global_batch_size}: {other}",
        )
        require(
            self.data.eval != 1 or isinstance(self.data.eval, float),
            f"objective.name={name} needs data.eval of at least 2 samples, got 1: {other}",
        )

    def _check_rollouts(self) -> None:
        """What means nothing where completions were sampled before."""
        require(
            self.data.too_long == "left_out",
            f"data.too_long={self.data.too_long} would give a part of a completion the reward of"
            " the whole; with objective.name=grpo it must be left_out",
        )
        require(
            not isinstance(self.log.samples, int) or not self.log.samples,
            f"log.samples={self.log.samples} asks questions of the data, and rollouts are none;"
            " list the questions themselves: log.samples=[...]",
        )

    def _check_scored(self) -> None:
        """Options that need the log-probabilities of a language model."""
        name = self.objective.name
        require(
            self.data.too_long in ("left_out", "truncate_left"),
            f"data.too_long={self.data.too_long} would cut off the end of a text, from which"
            f" objective.name={name} reads its score; it can be left_out or truncate_left",
        )
        unread = {
            "log.samples": bool(self.log.samples),
            "train.check_base=loss": self.train.check_base == "loss",
            "checkpoint.serve": self.checkpoint.serve is not None,
        }
        for option, is_set in unread.items():
            require(
                not is_set,
                f"{option} needs the head of a language model, which objective.name={name} replaces"
                " by a score head; leave it out",
            )

    def check_training(self) -> None:
        """Check what only a training needs, not a plan or an evaluation by the same config; raises
        ``ValueError``."""
        if self.log.samples:
            check_generation(self.parallel.pp, self.parallel.cp, "log.samples")
        following = {
            "checkpoint.keep_best": self.checkpoint.keep_best,
            "train.patience": self.train.patience,
        }
        for option, value in following.items():
            # The text of YAML, which writes true where Python writes True.
            set_to = f"{option}={str(value).lower()}"
            require(
                not value or self.data.eval is not None,
                f"{set_to} needs evaluations: name data.eval, or the number of samples to hold out",
            )
            require(
                not value or self.train.eval_every > 0,
                f"{set_to} needs train.eval_every: without it a run is evaluated only before its"
                " first and after its last step",
            )

    def check_world(self, world_size: int) -> None:
        """Check all that depends on the number of ranks; raises ``ValueError``."""
        # Experts have replicas of their own, but samples are divided over those of attention.
        dp, _ = self.parallel.data_parallel_sizes(world_size)
        # Rows of a given size: the samples of a step need not divide, and the number of rows is
        # made to fit.
        if self.train.micro_batch_tokens is not None:
            return
        batch = self.train.global_batch_size
        micro = self.train.micro_batch_size
        p = self.parallel
        require(
            batch % (micro * dp) == 0,
            f"train.global_batch_size={batch} cannot be divided: micro_batch_size={micro} * data"
            f" parallel={dp} = {micro * dp}, and {batch} is not a multiple of {micro * dp}.\n "
            " Change train.global_batch_size or train.micro_batch_size.",
        )
        num_microbatches = batch // (micro * dp)
        # Megatron hands microbatches to the chunks in rounds of pp.
        require(
            p.vpp == 1 or num_microbatches % p.pp == 0,
            f"the interleaved schedule (parallel.vpp={p.vpp}) needs a number of microbatches that"
            f" is a multiple of parallel.pp={p.pp}; train.global_batch_size={batch} gives"
            f" {num_microbatches}.",
        )
