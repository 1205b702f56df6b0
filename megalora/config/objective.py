"""The ``objective`` section: what training minimises."""

from dataclasses import dataclass
from typing import Literal

from megalora.config.checks import require
from megalora.config.policy import PolicyConfig
from megalora.paths import expand

_OPTIONS = {
    "sft": (),
    "dpo": ("loss", "beta", "label_smoothing", "sft_weight", "reference"),
    "simpo": ("beta", "label_smoothing", "sft_weight", "margin"),
    "orpo": ("beta", "sft_weight"),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "reference"),
    "reward": ("centre",),
    "classify": ("num_labels", "labels"),
    "distill": ("teacher", "divergence", "temperature", "beta", "sft_weight"),
    "grpo": ("policy", "reference"),
}
"""Options that an objective reads; another one that is set would do nothing."""
_PAIRS = ("dpo", "simpo", "orpo", "reward")
"""Objectives of which a sample is a pair of answers."""
_SMOOTHED = ("sigmoid", "robust")
"""Losses of DPO that have label smoothing."""
MOST_LABELS = 1 << 20
"""Numbers of labels travel as float32, which has all integers up to 2^24."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: Literal["sft", "dpo", "simpo", "orpo", "kto", "reward", "classify", "distill", "grpo"] = (
        "sft"
    )
    """``sft``: cross entropy of the assistant's tokens. ``dpo``, ``simpo``, ``orpo`` and ``reward``
    learn from pairs of a preferred and a rejected answer, of which ``train.global_batch_size``
    counts pairs: ``dpo`` compares with a reference, whose log-probabilities a pass of its own finds
    in every step; the others need none. ``kto`` learns from single answers that are labelled good
    or bad, compared with a reference. ``reward`` and ``classify`` train a score head in place of
    lm_head: ``reward`` gives an answer a number by which the preferred one is to lead
    (Bradley-Terry), ``classify`` gives a text or a conversation one of several labels. ``distill``
    learns the next-token distributions of ``objective.teacher`` at the assistant's tokens. ``grpo``
    learns from completions that were sampled before, with their rewards: by how much each is better
    than others of its prompt. ``objective.policy`` says how."""
    reference: Literal["base", "start"] = "base"
    """Of ``dpo`` and ``kto``, and of ``grpo`` with ``objective.policy.kl_coef``, what the model is
    compared with: ``base``, with the adapters switched off, or ``start``, the adapter as it was
    when the run began, such as an imported one. A second copy of the factors holds ``start``, and
    so does every checkpoint."""
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """Of ``dpo``: ``sigmoid`` (DPO, and conservative DPO with ``objective.label_smoothing``),
    ``robust`` (unbiased where that share of the labels is wrong), ``hinge`` (SLiC) or ``ipo`` (per
    token)."""
    beta: float | None = None
    """Of ``dpo`` and ``kto``, how closely the model stays to the reference: higher is closer. Of
    ``simpo``, the scale of the mean log-probabilities; of ``orpo``, the weight of the odds ratio.
    Of ``distill`` with ``objective.divergence: jsd``, the teacher's share of the mixture, between 0
    and 1. null is 0.1, 2 for ``simpo`` and 0.5 for ``distill``."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be labelled the wrong way round, below 0.5. For ``simpo``
    and the losses sigmoid and robust."""
    sft_weight: float | None = None
    """Weight of the cross entropy of the chosen answers, per target token, beside the preference;
    of ``distill``, that of the target tokens, beside the distance from the teacher. null is 0, and
    1 for ``orpo``."""
    margin: float | None = None
    """Of ``simpo``: by how much the chosen answer is to lead, in ``objective.beta`` times mean
    log-probabilities. null is 0.5."""
    centre: float | None = None
    """Of ``reward``: weight of the square of the sum of a pair's scores, which keeps scores near
    0. null leaves the term out."""
    num_labels: int | None = None
    """Of ``classify``: number of labels, which the data gives as numbers from 0 on. 1 learns the
    numbers of the data themselves, by their squared error. null is that of ``objective.labels``."""
    labels: list[str] | None = None
    """Of ``classify``: names of the labels, in the order of their numbers. The data may hold names
    or numbers."""
    desirable_weight: float = 1.0
    """Of ``kto``: weight of the good answers. The paper has the sums of weights of good and of bad
    ones between 1 : 1 and 4 : 3, so weigh up the rarer ones."""
    undesirable_weight: float = 1.0
    """Of ``kto``: weight of the bad answers."""
    teacher: str | None = None
    """Of ``distill``: the folder or hub name of a model with the vocabulary of ``model.path``, of
    any size and family that megalora computes. It is loaded frozen beside the model, in
    ``model.dtype`` and under the same layout. ``base`` is the model itself with the adapters
    switched off, without a second model. A folder that ``megalora logits`` wrote has what a teacher
    said of these samples."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """Of ``distill``: ``forward`` is KL(teacher || student), ``reverse`` is KL(student || teacher),
    ``jsd`` the generalised Jensen-Shannon divergence of GKD, with ``objective.beta``."""
    temperature: float = 1.0
    """Of ``distill``: divides the logits of teacher and student; the distance is multiplied by its
    square."""

    policy: PolicyConfig | None = None
    """Of ``grpo``: the loss, what it is compared with, and how rewards become advantages. null is
    all of its defaults."""

    def __post_init__(self) -> None:
        # An option that only another objective reads is a mistake: it would do nothing.
        read = _OPTIONS[self.name]
        defaults = {
            "loss": "sigmoid", "beta": None, "label_smoothing": 0, "sft_weight": None,
            "margin": None, "reference": "base", "desirable_weight": 1, "undesirable_weight": 1,
            "centre": None, "num_labels": None, "labels": None, "teacher": None,
            "divergence": "forward", "temperature": 1, "policy": None,
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
        weights = ("sft_weight", "margin", "centre", "desirable_weight", "undesirable_weight")
        for option in weights:
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
        if self.name == "classify":
            self._check_labels()
        if self.name == "distill":
            self._check_distillation()
        policy = self.learned_policy
        require(
            policy is None or bool(policy.kl_coef) or self.reference == "base",
            f"objective.reference={self.reference} does nothing for objective.name=grpo without"
            " objective.policy.kl_coef above 0: nothing is compared with it",
        )

    def _check_distillation(self) -> None:
        if self.teacher is None:
            raise ValueError(
                "objective.name=distill needs objective.teacher: the folder or hub name of a model,"
                " or base for the model without its adapters"
            )
        # An adapter begins as the base: of its teacher it would learn rounding.
        require(
            self.teacher != "base" or bool(self.sft_weight),
            "objective.teacher=base needs objective.sft_weight above 0: the model begins as its own"
            " teacher, and nothing else would be learned",
        )
        # Frozen, so not by assignment; "base" stays as it is.
        object.__setattr__(self, "teacher", expand(self.teacher, "objective.teacher"))
        require(
            0 < self.temperature < float("inf"),
            f"objective.temperature must be above 0, got {self.temperature}",
        )
        require(
            self.beta is None or self.divergence == "jsd",
            f"objective.beta={self.beta} does nothing for objective.divergence={self.divergence};"
            " only jsd has it",
        )
        require(
            self.beta is None or self.beta < 1,
            f"objective.beta={self.beta} must be below 1: with objective.divergence=jsd it is the"
            " teacher's share of a mixture, of which forward and reverse are the ends",
        )

    def _check_labels(self) -> None:
        names = self.labels
        # Labels of the data alone would not say how many there are: rows may lack one.
        require(
            self.num_labels is not None or names is not None,
            "objective.name=classify needs objective.labels, the names of the labels, or"
            " objective.num_labels, their number",
        )
        require(
            self.num_labels is None or 1 <= self.num_labels <= MOST_LABELS,
            f"objective.num_labels must be from 1 to {MOST_LABELS:,}, got {self.num_labels}",
        )
        # Labels may have no names.
        if names is None:
            return
        require(
            len(names) >= 2 and len(set(names)) == len(names) and all(map(str.strip, names)),
            f"objective.labels must be two or more different names, got {names}",
        )
        require(
            self.num_labels in (None, len(names)),
            f"objective.num_labels={self.num_labels} is not the number of objective.labels, which"
            f" are {len(names)}; leave it out",
        )

    @property
    def pairs(self) -> bool:
        """Whether a sample is a pair of answers."""
        # Of a reward model too: its scores are compared.
        return self.name in _PAIRS

    @property
    def labelled(self) -> bool:
        """Whether a sample says if its answer is good."""
        return self.name == "kto"

    @property
    def num_scores(self) -> int:
        """Numbers that a score head gives a sequence; 0 for a language model."""
        if self.name == "classify":
            # One of the two is set, or both agree.
            return self.num_labels or len(self.labels or ())
        return int(self.name == "reward")

    @property
    def unread_tokens(self) -> int:
        """Tokens of a sequence that take no place in a row: the last one is only a label, unless a
        score is read from it."""
        return 0 if self.num_scores else 1

    @property
    def sequences(self) -> int:
        """Sequences of a sample."""
        return 2 if self.pairs else 1

    @property
    def num_references(self) -> int:
        """Passes without gradients in every step, before its own."""
        # Of KTO the model and the reference read mismatched answers, too.
        if self.teacher == "base":
            return 1
        if (policy := self.learned_policy) is not None:
            # Both uses share a pass where they read the same model.
            models = [self.reference] if policy.kl_coef else []
            models += [policy.proximal] if policy.proximal in ("start", "recompute") else []
            return len(set(models))
        return {"dpo": 1, "kto": 3}.get(self.name, 0)

    @property
    def asks_base(self) -> bool:
        """Whether steps have passes of the base, with what is trained switched off."""
        of_reference = self.name in ("dpo", "kto") and self.reference == "base"
        return of_reference or self.teacher == "base"

    @property
    def teacher_model(self) -> str | None:
        """Folder or hub name of a second model that is in memory; None where there is none."""
        return None if self.teacher == "base" else self.teacher

    @property
    def holds_start(self) -> bool:
        """Whether a run keeps a copy of the adapter that it began with."""
        policy = self.learned_policy
        of_policy = policy is not None and policy.proximal == "start"
        return self.reference == "start" or of_policy

    @property
    def learned_policy(self) -> PolicyConfig | None:
        """How rollouts are learned; None where samples are none."""
        return (self.policy or PolicyConfig()) if self.name == "grpo" else None
