"""The ``train`` section: steps, batches, the optimizer, and checks of the run."""

import math
from dataclasses import dataclass
from typing import Literal

from megalora.config.checks import require
from megalora.config.recompute import Recompute

# Checked as "above 0", so that NaN, which is neither above nor below, is refused too.
_ABOVE_ZERO = (
    "steps", "epochs", "lr", "loraplus_lr_ratio", "saved_lr_ratio",
    "global_batch_size", "micro_batch_size",
    "micro_batch_tokens", "timeout_minutes", "hang_seconds",
)  # fmt: skip
# Of these 0 means never, or none.
_NOT_NEGATIVE = (
    "warmup", "weight_decay", "clip_grad", "eval_every", "patience", "check_replicas_every",
    "max_bad_steps", "z_loss", "label_smoothing", "router_aux_loss_coef",
)  # fmt: skip


def check_warmup(warmup: int, steps: int, what: str) -> None:
    """Raise ``ValueError`` if no step would reach the learning rate that was asked for.

    Args:
        what: name of the number of steps, for the message.
    """
    require(
        warmup <= steps,
        f"train.warmup={warmup} is longer than {what}: the learning rate would end at"
        f" {steps / max(1, warmup):.0%} of train.lr. Lower train.warmup or train more steps.",
    )


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Steps of which a run records a trace."""

    start: int
    """The first of them, counted from 1."""
    steps: int = 1
    """How many."""

    def __post_init__(self) -> None:
        for name in ("start", "steps"):
            require(
                getattr(self, name) >= 1,
                f"train.profile.{name} must be at least 1, got {getattr(self, name)}",
            )

    def check_within(self, steps: int, what: str) -> None:
        """Raise ``ValueError`` if a run of so many steps ends before the trace does.

        Args:
            what: name of the number of steps, for the message.
        """
        last = self.start + self.steps - 1
        require(
            last <= steps,
            f"train.profile records steps {self.start} to {last}, beyond {what}: no trace would be"
            " whole. Lower train.profile.start or train.profile.steps.",
        )


@dataclass(frozen=True, kw_only=True)
class Relora:
    """Periodic merges of the adapters into the base."""

    every: int
    """Number of optimizer steps after which the adapters are merged and new ones begin."""
    warmup: int = 0
    """Number of steps over which the learning rate rises again after a merge."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"train.relora.every must be at least 1, got {self.every}")
        require(
            0 <= self.warmup < self.every,
            f"train.relora.warmup must be in [0, {self.every}), below train.relora.every, got"
            f" {self.warmup}",
        )

    def check_within(self, steps: int, what: str) -> None:
        """Raise ``ValueError`` if a run of so many steps ends before its first merge.

        Args:
            what: name of the number of steps, for the message.
        """
        require(
            self.every < steps,
            f"train.relora.every={self.every} is not below {what}: nothing would ever be merged."
            " Lower train.relora.every or leave train.relora out.",
        )


@dataclass(frozen=True, kw_only=True)
class SkipSpikes:
    """Steps that are left out because their loss is far above those before them."""

    sigma: float = 6.0
    """Standard deviations above the mean of the last losses from which on a loss is a spike."""
    window: int = 128
    """Number of last steps that are looked at; nothing is a spike before half as many."""

    def __post_init__(self) -> None:
        require(
            0 < self.sigma < math.inf,
            f"train.skip_spikes.sigma must be a number above 0, got {self.sigma}",
        )
        # A checkpoint's state.json has all of them.
        require(
            2 <= self.window <= 10_000,
            f"train.skip_spikes.window must be in [2, 10000], got {self.window}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int | None = None
    """Number of optimizer steps. Give ``train.steps`` or ``train.epochs``; where both are given,
    the steps count, and the run says so."""
    epochs: float | None = None
    """Number of passes over the training data; may be a fraction."""
    global_batch_size: int = 16
    """Samples per optimizer step, over all ranks. Must be a multiple of
    ``train.micro_batch_size`` times the data-parallel size, unless ``train.micro_batch_tokens`` is
    given."""
    micro_batch_size: int = 1
    """Samples per forward pass on one rank. They share a row of tokens without padding."""
    micro_batch_tokens: int | None = None
    """Tokens per forward pass on one rank, at most; a row is then rounded up to a multiple of
    tp, with context parallelism of 2 cp tp. The samples of a step are packed into rows
    of that size, which changes neither loss nor gradient; ``train.micro_batch_size`` must be left
    at 1."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of the B factors over that of the A factors, as in LoRA+ (arXiv 2402.12354,
    which advises 16). ``train.lr``, and the rate in the log, are those of A; 1 is plain LoRA."""
    saved_lr_ratio: float = 1.0
    """Learning rate of what is trained whole (``lora.modules_to_save``, ``lora.bias``,
    ``lora.trainable_token_indices``, a score head) over ``train.lr``; below 1 for embeddings, which
    have more to lose than adapters."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after warm-up: ``cosine`` and ``linear`` end at zero on the last
    step, ``constant`` does not decay."""
    warmup: int = 0
    """Number of steps over which the learning rate rises linearly to ``train.lr``."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the adapters, such as 0.999; below 1. Checkpoints
    have the average beside the adapter, in ``ema``, as an adapter of its own. 0 keeps none."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, applied to the adapters."""
    clip_grad: float = 1.0
    """Maximum L2 norm of the gradient over all adapters; larger gradients are scaled down to it.
    0 turns clipping off."""
    max_bad_steps: int = 0
    """Number of steps whose loss or gradient is NaN or infinite that a run leaves out, by changing
    nothing, before the next one ends it. Their samples are written to ``bad_steps.jsonl`` in the
    run's folder. A resumed run counts anew."""
    skip_spikes: SkipSpikes | None = None
    """Also count a step as bad, and change nothing, where its loss is a spike: ``{sigma: 6, window:
    128}`` where it is more than 6 standard deviations above the mean of the 128 steps before. Needs
    ``train.max_bad_steps``, which counts both. A resumed run knows the losses before it. null takes
    every loss that is a number."""
    relora: Relora | None = None
    """Merge the adapters into the base every so often and train new ones, as in ReLoRA (arXiv
    2307.05695): ``{every: 1000, warmup: 50}``. Moments start from zero, and the learning rate rises
    again over ``warmup`` steps to where the schedule has it. A checkpoint's adapter is the sum of
    all of them, of so many times the rank; the base is never rounded twice. null never merges."""
    z_loss: float = 0.0
    """Coefficient of the z-loss: ``z_loss`` times the squared log-sum-exp of the logits is added to
    the loss of each target token, as in PaLM (which used 1e-4). 0 turns it off."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the vocabulary, as in torch's
    ``cross_entropy(label_smoothing=...)``. Must be below 1. Evaluations report the cross entropy
    without it and without z-loss."""
    router_aux_loss_coef: float = 0.0
    """Coefficient of a loss that keeps experts evenly used, added to the objective for each layer
    with experts and each sequence: that of DeepSeek-V3 (which used 1e-4), Megatron's
    ``seq_aux_loss``. The log has its mean as ``balance_loss``, which is 1 for even routing. All
    adapters before a router learn from it. 0 turns it off, as transformers does unless
    ``output_router_logits`` is set."""
    recompute: Recompute = "off"
    """Activations that the backward pass computes again instead of keeping them. ``selective``:
    core attention, gate_up of experts and dense MLPs; ``full``: whole layers. An adapter on o_proj
    keeps the result of core attention in any case, so that ``selective`` saves little there.
    ``{layers: 12, rest: selective}``: the first 12 layers of every rank fully, its others
    selectively or, without ``rest``, not at all. A rank counts its layers through all its model
    chunks; the first chunk has most microbatches in flight. ``megalora plan`` finds the number."""
    eval_every: int = 0
    """Number of steps between evaluations. 0 evaluates only before the first and after the last
    step."""
    patience: int = 0
    """Number of evaluations in a row without a new lowest loss after which the run ends. The one
    before the first step does not count. 0 never ends a run early. Needs ``data.eval`` and
    ``train.eval_every``."""
    seed: int = 0
    """Seed for adapter initialisation and dropout."""
    timeout_minutes: float = 30
    """Minutes that a rank waits for another one before it considers it lost and ends the run. Must
    be longer than loading, saving and tokenising new data take."""
    hang_seconds: float = 30
    """Seconds without progress of any rank after which the run counts as hanging and ends. A step
    or an evaluation may always take five times the longest one before it; the first of each, and
    saving, are bounded by ``train.timeout_minutes`` alone."""
    check_base: Literal["layer", "loss", "off"] = "layer"
    """What is compared with transformers before the first step, in the first rank's host memory.
    ``layer``: one loaded layer of each kind, the embedding and the head, on a few tokens. ``loss``:
    also the loss of the first microbatch, for which the whole model must fit in that memory."""
    check_replicas_every: int = 100
    """Number of steps between comparisons of the copies that different ranks hold of an adapter
    tensor. They are also compared before each save. 0 turns both off."""
    profile: Profile | None = None
    """Steps to record with torch's profiler on the first rank: ``{start: 5, steps: 2}`` writes a
    Chrome trace of steps 5 and 6 to the run folder. Recorded steps are slower. null records
    none."""

    def __post_init__(self) -> None:
        require(
            self.steps is not None or self.epochs is not None,
            "give train.steps or train.epochs: how long the run is to be",
        )
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            # Steps or epochs may be unset, and so may tokens of a row.
            require(value is None or value > 0, f"train.{name} must be above 0, got {value}")
        for name in _NOT_NEGATIVE:
            require(
                getattr(self, name) >= 0,
                f"train.{name} must not be negative, got {getattr(self, name)}",
            )
        # 1 is the default: whether it was written down cannot be seen, and does not matter.
        require(
            self.micro_batch_tokens is None or self.micro_batch_size == 1,
            f"train.micro_batch_tokens={self.micro_batch_tokens} decides how many samples share a"
            f" row, and so does train.micro_batch_size={self.micro_batch_size}: give one of them",
        )
        for option in ("loraplus_lr_ratio", "saved_lr_ratio"):
            ratio = getattr(self, option)
            require(math.isfinite(ratio), f"train.{option} must be a finite number, got {ratio}")
        # Not negative, as infinity is: the first loss would be infinite.
        require(
            math.isfinite(self.z_loss), f"train.z_loss must be a finite number, got {self.z_loss}"
        )
        require(
            math.isfinite(self.router_aux_loss_coef),
            f"train.router_aux_loss_coef must be a finite number, got {self.router_aux_loss_coef}",
        )
        require(0 <= self.ema_decay < 1, f"train.ema_decay must be in [0, 1), got {self.ema_decay}")
        require(
            not self.ema_decay or self.relora is None,
            "train.ema_decay: the average of adapters that train.relora merges and begins anew is"
            " that of none of them; leave one of the two out",
        )
        require(
            self.skip_spikes is None or self.max_bad_steps > 0,
            "train.skip_spikes leaves steps out, and train.max_bad_steps=0 allows none: say how"
            " many may be",
        )
        require(
            self.label_smoothing < 1,
            f"train.label_smoothing must be below 1, got {self.label_smoothing}: at 1 nothing of"
            " the target would be left",
        )
        # With epochs, the number of steps is known only when the data has been read.
        if self.steps is not None:
            self.check_within(self.steps, f"train.steps={self.steps}")

    def check_within(self, steps: int, what: str) -> None:
        """Raise ``ValueError`` for what a run of so many steps has no time for.

        Args:
            what: names the steps in the message.
        """
        check_warmup(self.warmup, steps, what)
        if self.profile is not None:
            self.profile.check_within(steps, what)
        if self.relora is not None:
            self.relora.check_within(steps, what)
