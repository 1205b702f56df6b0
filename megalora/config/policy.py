"""Options of learning from rewards: the loss, its correction for the engine, and advantages."""

from dataclasses import dataclass, field
from typing import Literal

from megalora.config.checks import require

CLIPS = {"clip": (0.2, 0.2), "gspo": (3e-4, 4e-4), "gmpo": (0.4, 0.4)}
"""Losses that clip, with what null means for ``clip_low`` and ``clip_high``."""
_BY_TOKEN = ("clip", "cispo", "vespo", "plain")
"""Losses whose papers take the mean over tokens; the others take it over sequences first."""
_READ_BY = {
    "clip_low": tuple(CLIPS), "clip_high": tuple(CLIPS), "dual_clip": ("clip",),
    "ratio_cap": ("clip", "gspo", "cispo"), "sapo": ("sapo",), "vespo_good": ("vespo",),
    "vespo_bad": ("vespo",),
}  # fmt: skip
"""Options that some losses read alone, and which."""
_CISPO_CAP = 5.0
"""As ScaleRL advises (2510.13786)."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    loss: Literal["clip", "gspo", "gmpo", "cispo", "sapo", "vespo", "plain"] = "clip"
    """``clip``: PPO's and GRPO's, with the options below DAPO's and Dr. GRPO's too. ``gspo`` and
    ``gmpo``: one ratio for a sequence, the geometric mean of those of its tokens, clipped after or
    before it is taken. ``cispo``: log-probabilities weighted by capped ratios. ``sapo``: a soft
    gate in place of the clip. ``vespo``: soft weights of whole sequences. ``plain``: the ratio
    alone, as with ``drop_gap``."""
    clip_low: float | None = None
    """How far a ratio may fall below 1 before it counts no more. null is 0.2; 3e-4 for ``gspo``;
    0.4, of the logarithm, for ``gmpo``."""
    clip_high: float | None = None
    """The same above 1; DAPO has 0.28. null is 0.2; 4e-4 for ``gspo``, 0.4 for ``gmpo``."""
    dual_clip: float | None = None
    """Of ``clip``: bounds the loss of a token with a negative advantage to that of this ratio;
    above 1, such as 3. null does not bound it."""
    ratio_cap: float | None = None
    """Largest ratio: of ``cispo``, whose weight it bounds (null is 5), and of ``clip`` and
    ``gspo``, where it bounds the ratio that is not clipped (two-sided clipping; null does not)."""
    sapo: list[float] = field(default_factory=lambda: [1.0, 1.05])
    """Temperatures of ``sapo`` for advantages above 0 and for the others."""
    vespo_good: list[float] = field(default_factory=lambda: [2.0, 3.0])
    """Exponent and rate of ``vespo``'s weights for advantages of 0 and above."""
    vespo_bad: list[float] = field(default_factory=lambda: [3.0, 2.0])
    """The same for advantages below 0."""
    reduction: Literal["token", "sequence", "constant", "sum"] | None = None
    """``token``: the mean over all learned tokens of the global batch (DAPO). ``sequence``: the
    mean over sequences of the mean over their tokens (GRPO). ``constant``: the sum over tokens,
    divided by sequences times ``reduction_length`` (Dr. GRPO). ``sum``: by sequences alone (LUSPO).
    null is ``token`` for ``clip``, ``cispo``, ``vespo`` and ``plain``, and ``sequence`` for the
    others."""
    reduction_length: int | None = None
    """Of ``constant``: tokens that a sum is divided by, the longest completion."""
    proximal: Literal["engine", "data", "start", "current", "recompute"] = "engine"
    """Whose log-probabilities ratios compare with: ``engine``, those that the sampler gave
    (``logprobs`` of the data); ``data``, those in ``proximal_logprobs``; ``start``, the adapter
    that the run began with, computed here by a pass of its own; ``current``, the model as it is,
    so that ratios are 1 and only their gradient counts; ``recompute``, with ``megalora rl``, the
    adapter as it was when the completions were taken to be trained on, computed here likewise. All
    but ``engine`` leave what lies between engine and trainer to ``mismatch`` (decoupled PPO)."""
    mismatch: Literal["off", "token", "sequence", "geometric"] = "off"
    """Weights for what lies between the engine and ``proximal``: ratios of single tokens, products
    over sequences, or their geometric mean. A token without a log-probability of the engine has
    weight 1."""
    mismatch_action: Literal["truncate", "mask"] = "truncate"
    """What becomes of weights outside of the limits: they are set to the limit (TIS), or to 0."""
    mismatch_lower: float = 0.0
    """Lower limit of the weights."""
    mismatch_upper: float = 3.0
    """Upper limit of the weights."""
    drop_gap: float | None = None
    """Drops tokens whose probability has moved away from the engine's by more than this, in the
    direction of their advantage (DPPO, with ``loss: plain``); between 0 and 1. null drops none."""
    drop_divergence: float | None = None
    """Drops sequences with a negative advantage whose mean log-ratio of the engine to the model
    is above this (DeepSeek-V3.2). null drops none."""
    kl_coef: float = 0.0
    """Weight of the divergence from ``objective.reference`` in the loss. 0 needs no reference."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Its estimator per token, with d the log-ratio of the reference to the model: -d, d^2 / 2 or
    exp(d) - d - 1."""
    kl_corrected: bool = False
    """Whether the estimate is weighted by the ratio, which makes its gradient that of its mean
    under the model; ``k1`` needs it."""
    temperature: float = 1.0
    """Temperature at which completions are sampled, or were: ratios, divergence and entropy are of
    logits divided by it, and ``logprobs`` of the data must be. ``megalora rl`` samples at it."""
    entropy: bool = True
    """Whether to log the entropy of the model's distributions. It costs reading the logits a second
    time in backward."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy of a token, which is rewarded."""
    advantage_mean: Literal["group", "leave_one_out", "batch", "none"] = "group"
    """What is subtracted from a reward: the mean of its group, that of the others of its group, or
    the mean of the global batch."""
    advantage_std: Literal["group", "batch", "none"] = "group"
    """What that is divided by: the standard deviation (n - 1) of the rewards of its group or of the
    global batch; ``none`` as in Dr. GRPO."""
    advantage_epsilon: float = 1e-4
    """Added to the standard deviation."""
    drop_even_groups: bool = False
    """Whether to leave out groups whose rewards are all alike, of which nothing is learned (dynamic
    sampling); batches are filled with others."""
    drop_truncated: bool = False
    """Whether to leave completions out of the loss that the length limit has cut, as the column
    ``truncated`` says; their rewards still count for their group."""
    overlong_length: int | None = None
    """Longest completion in tokens, from which ``overlong_cache`` counts. null shapes no reward."""
    overlong_cache: int | None = None
    """Tokens over which a reward falls by 1, up to ``overlong_length`` (DAPO, equation 13)."""

    def __post_init__(self) -> None:
        self._check_loss()
        self._check_reduction()
        self._check_corrections()
        self._check_advantages()

    def _check_loss(self) -> None:
        for option, losses in _READ_BY.items():
            value = getattr(self, option)
            default: object = None
            if isinstance(value, list):
                default = {"sapo": [1.0, 1.05], "vespo_good": [2.0, 3.0]}.get(option, [3.0, 2.0])
                require(
                    len(value) == 2 and all(0 < v < float("inf") for v in value),
                    f"objective.policy.{option} must be two numbers above 0, got {value}",
                )
            require(
                value == default or self.loss in losses,
                f"objective.policy.{option}={value} does nothing for objective.policy.loss="
                f"{self.loss}; {' and '.join(losses)} read it",
            )
        for option in ("clip_low", "clip_high"):
            value = getattr(self, option)
            require(
                value is None or 0 < value < float("inf"),
                f"objective.policy.{option} must be above 0, got {value}",
            )
        # A ratio is above 0 in any case; of gmpo it is the logarithm that is clipped.
        require(
            self.loss == "gmpo" or self.clip_low is None or self.clip_low <= 1,
            f"objective.policy.clip_low must be at most 1, got {self.clip_low}: ratios are above 0",
        )
        for option in ("dual_clip", "ratio_cap"):
            value = getattr(self, option)
            require(
                value is None or 1 < value < float("inf"),
                f"objective.policy.{option} is a ratio above 1, got {value}",
            )

    def _check_reduction(self) -> None:
        # A constant needs its length, and nothing else reads it.
        require(
            (self.reduction == "constant") == (self.reduction_length is not None),
            "objective.policy.reduction=constant needs objective.policy.reduction_length, the"
            " longest completion in tokens, and no other reduction reads it; they are"
            f" {self.reduction} and {self.reduction_length}",
        )
        require(
            self.reduction_length is None or self.reduction_length >= 1,
            f"objective.policy.reduction_length must be at least 1, got {self.reduction_length}",
        )
        require(
            self.loss != "gmpo" or self.reduction in (None, "sequence"),
            f"objective.policy.reduction={self.reduction}: gmpo has one ratio for a sequence and"
            " takes the mean over sequences; leave it out",
        )

    def _check_corrections(self) -> None:
        require(
            self.mismatch == "off" or self.proximal != "engine",
            f"objective.policy.mismatch={self.mismatch} does nothing for objective.policy.proximal="
            "engine, whose ratios hold the mismatch already; use proximal start, current or data",
        )
        require(
            self.mismatch != "off" or self._mismatch_is_default,
            "objective.policy.mismatch_action, mismatch_lower and mismatch_upper do nothing for"
            " objective.policy.mismatch=off; set it to token, sequence or geometric",
        )
        require(
            0 <= self.mismatch_lower < self.mismatch_upper < float("inf"),
            "objective.policy.mismatch_lower must be from 0 to below mismatch_upper, got"
            f" {self.mismatch_lower} and {self.mismatch_upper}",
        )
        # As in TRL: its weights enter a product over the sequence.
        require(
            self.loss != "vespo" or self.mismatch in ("off", "token"),
            f"objective.policy.mismatch={self.mismatch}: vespo multiplies weights over the sequence"
            " by itself; use mismatch=token",
        )
        require(
            self.drop_gap is None or 0 < self.drop_gap < 1,
            f"objective.policy.drop_gap is between 0 and 1, got {self.drop_gap}: it is a difference"
            " of probabilities",
        )
        require(
            self.drop_divergence is None or 0 <= self.drop_divergence < float("inf"),
            f"objective.policy.drop_divergence must not be negative, got {self.drop_divergence}",
        )
        require(
            0 < self.temperature < float("inf"),
            f"objective.policy.temperature must be above 0, got {self.temperature}",
        )
        for option in ("kl_coef", "entropy_coef"):
            require(
                0 <= getattr(self, option) < float("inf"),
                f"objective.policy.{option} must not be negative, got {getattr(self, option)}",
            )
        require(
            bool(self.kl_coef) or (self.kl == "k3" and not self.kl_corrected),
            f"objective.policy.kl={self.kl}, kl_corrected={str(self.kl_corrected).lower()}: without"
            " objective.policy.kl_coef above 0 nothing is compared with a reference",
        )
        require(
            self.kl != "k1" or self.kl_corrected,
            "objective.policy.kl=k1 needs objective.policy.kl_corrected=true: without the ratio its"
            " gradient is 0 on average. k2 and k3 do without",
        )

    def _check_advantages(self) -> None:
        require(
            0 <= self.advantage_epsilon < float("inf"),
            f"objective.policy.advantage_epsilon must not be negative, got"
            f" {self.advantage_epsilon}",
        )
        require(
            self.advantage_mean != "batch" or self.advantage_std != "group",
            "objective.policy.advantage_mean=batch with advantage_std=group: the mean is of the"
            " global batch, and so the deviation must be batch or none",
        )
        length = self.overlong_length
        cache = self.overlong_cache
        require(
            (length is None) == (cache is None),
            "objective.policy.overlong_length and overlong_cache belong together, got"
            f" {length} and {cache}",
        )
        require(
            length is None or cache is None or 1 <= cache <= length,
            f"objective.policy.overlong_cache must be from 1 to overlong_length={length}, got"
            f" {cache}",
        )

    @property
    def _mismatch_is_default(self) -> bool:
        limits = (self.mismatch_action, self.mismatch_lower, self.mismatch_upper)
        return limits == ("truncate", 0.0, 3.0)

    @property
    def clips(self) -> tuple[float, float]:
        """How far a ratio may fall below 1, and rise above it; of losses that clip."""
        low, high = CLIPS[self.loss]
        return (
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
        )

    @property
    def cap(self) -> float | None:
        """Largest ratio; None for none."""
        return _CISPO_CAP if self.loss == "cispo" and self.ratio_cap is None else self.ratio_cap

    @property
    def reduced_by(self) -> str:
        """``reduction`` with null replaced."""
        return self.reduction or ("token" if self.loss in _BY_TOKEN else "sequence")

    @property
    def reads_engine(self) -> bool:
        """Whether the loss needs the engine's log-probabilities."""
        drops = self.drop_gap is not None or self.drop_divergence is not None
        return self.proximal == "engine" or self.mismatch != "off" or drops

    @property
    def by_batch(self) -> bool:
        """Whether advantages are known only when a step's batch is."""
        return "batch" in (self.advantage_mean, self.advantage_std)
