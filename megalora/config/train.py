"""The ``train`` section: steps, batches and the optimizer."""

from dataclasses import dataclass
from typing import Literal

from megalora.config.checks import require


def check_warmup(warmup: int, steps: int, what: str) -> None:
    """Raise ``ValueError`` where no step would reach the learning rate that was asked for.

    Args:
        what: names the run's steps.
    """
    require(
        warmup <= steps,
        f"train.warmup={warmup} is longer than {what}: the learning rate would end at"
        f" {steps / max(1, warmup):.0%} of train.lr. Lower train.warmup or train more steps.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int | None = None
    """Optimizer steps. Give either steps or epochs."""
    epochs: float | None = None
    global_batch_size: int = 16
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Samples per forward pass on one rank."""
    lr: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From lr down to zero at the last step (constant: not at all), after a linear warm-up."""
    warmup: int = 0
    """Steps."""
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest L2 norm of the whole gradient; 0 turns clipping off."""
    recompute: Literal["off", "selective", "full"] = "off"
    """What backward computes again. selective: core attention, gate_up of experts, dense MLPs;
    full: whole layers. An adapter on o_proj keeps core attention's result all the same: little is
    saved there."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates only before the first and after the last step."""
    seed: int = 0
    """Of adapter initialisation and dropout."""
    timeout_minutes: float = 30
    """How long a rank waits for another before it takes it for lost and ends the run; more than
    loading and saving take."""
    check_base: Literal["layer", "loss", "off"] = "layer"
    """What is compared with transformers on the first rank's host before the first step. layer: one
    layer of each kind as loaded, embedding and head, on a few tokens; loss: the loss of the first
    microbatch too, for which the whole model must fit that host."""
    check_replicas_every: int = 100
    """Steps between comparisons of every adapter tensor's copies on all ranks, also before each
    save; 0 turns them off."""

    def __post_init__(self) -> None:
        require(
            (self.steps is None) != (self.epochs is None),
            f"give exactly one of train.steps and train.epochs (got steps={self.steps},"
            f" epochs={self.epochs})",
        )
        for name in (
            "steps",
            "epochs",
            "lr",
            "global_batch_size",
            "micro_batch_size",
            "timeout_minutes",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name} must be above 0, got {value}")
        for name in ("warmup", "weight_decay", "clip_grad", "eval_every", "check_replicas_every"):
            require(
                getattr(self, name) >= 0,
                f"train.{name} must not be negative, got {getattr(self, name)}",
            )
        if self.steps is not None:
            check_warmup(self.warmup, self.steps, f"train.steps={self.steps}")
