"""The ``objective`` section: what training minimises."""

from dataclasses import dataclass
from typing import Literal

from megalora.config.checks import require

_OPTIONS = {
    "sft": (),
    "dpo": ("loss", "beta", "label_smoothing", "sft_weight", "reference"),
    "simpo": ("beta", "label_smoothing", "sft_weight", "margin"),
    "orpo": ("beta", "sft_weight"),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "reference"),
}
"""Options that an objective reads; another one that is set would do nothing."""
_SMOOTHED = ("sigmoid", "robust")
"""Losses of DPO that have label smoothing."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: Literal["sft", "dpo", "simpo", "orpo", "kto"] = "sft"
    """``sft``: cross entropy of the assistant's tokens. ``dpo``, ``simpo`` and ``orpo`` learn from
    pairs of a preferred and a rejected answer, of which ``train.global_batch_size`` counts pairs:
    ``dpo`` compares with a reference, whose log-probabilities a pass of its own finds in every
    step; ``simpo`` and ``orpo`` need none. ``kto`` learns from single answers that are labelled
    good or bad, compared with a reference."""
    reference: Literal["base", "start"] = "base"
    """Of ``dpo`` and ``kto``, what the model is compared with: ``base``, with the adapters switched
    off, or ``start``, the adapter as it was when the run began, such as an imported one. A second
    copy of the factors holds ``start``, and so does every checkpoint."""
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """Of ``dpo``: ``sigmoid`` (DPO, and conservative DPO with ``objective.label_smoothing``),
    ``robust`` (unbiased where that share of the labels is wrong), ``hinge`` (SLiC) or ``ipo`` (per
    token)."""
    beta: float | None = None
    """Of ``dpo`` and ``kto``, how closely the model stays to the reference: higher is closer. Of
    ``simpo``, the scale of the mean log-probabilities; of ``orpo``, the weight of the odds ratio.
    null is 0.1, and 2 for ``simpo``."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be labelled the wrong way round, below 0.5. For ``simpo``
    and the losses sigmoid and robust."""
    sft_weight: float | None = None
    """Weight of the cross entropy of the chosen answers, per target token, beside the preference.
    null is 0, and 1 for ``orpo``."""
    margin: float | None = None
    """Of ``simpo``: by how much the chosen answer is to lead, in ``objective.beta`` times mean
    log-probabilities. null is 0.5."""

    desirable_weight: float = 1.0
    """Of ``kto``: weight of the good answers. The paper has the sums of weights of good and of bad
    ones between 1 : 1 and 4 : 3, so weigh up the rarer ones."""
    undesirable_weight: float = 1.0
    """Of ``kto``: weight of the bad answers."""

    def __post_init__(self) -> None:
        # An option that only another objective reads is a mistake: it would do nothing.
        read = _OPTIONS[self.name]
        defaults = {
            "loss": "sigmoid", "beta": None, "label_smoothing": 0, "sft_weight": None,
            "margin": None, "reference": "base", "desirable_weight": 1, "undesirable_weight": 1,
        }  # fmt: skip
        for option, default in defaults.items():
            value = getattr(self, option)
            require(
                option in read or value == default,
                f"objective.{option}={value} does nothing for objective.name={self.name}, which"
                f" reads {', '.join(read) or 'no option of this section'}",
            )
        # Ranges: NaN lies in none.
        require(
            self.beta is None or 0 < self.beta < float("inf"),
            f"objective.beta must be above 0, got {self.beta}",
        )
        for option in ("sft_weight", "margin", "desirable_weight", "undesirable_weight"):
            value = getattr(self, option)
            require(
                value is None or 0 <= value < float("inf"),
                f"objective.{option} must not be negative, got {value}",
            )
        require(
            0 <= self.label_smoothing < 0.5,
            f"objective.label_smoothing must be in [0, 0.5), got {self.label_smoothing}: at a half"
            " a label says nothing",
        )
        require(
            not self.label_smoothing or self.name != "dpo" or self.loss in _SMOOTHED,
            f"objective.label_smoothing does nothing for objective.loss={self.loss}; only"
            f" {' and '.join(_SMOOTHED)} have it",
        )

    @property
    def pairs(self) -> bool:
        """Whether a sample is a pair of answers."""
        return self.name in ("dpo", "simpo", "orpo")

    @property
    def labelled(self) -> bool:
        """Whether a sample says if its answer is good."""
        return self.name == "kto"

    @property
    def sequences(self) -> int:
        """Sequences of a sample."""
        return 2 if self.pairs else 1

    @property
    def num_references(self) -> int:
        """Passes without gradients in every step, before its own."""
        # Of KTO the model and the reference read mismatched answers, too.
        return {"dpo": 1, "kto": 3}.get(self.name, 0)

    @property
    def holds_start(self) -> bool:
        """Whether a run keeps a copy of the adapter that it began with."""
        return self.reference == "start"
