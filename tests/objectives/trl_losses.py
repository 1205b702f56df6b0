"""TRL's preference losses as functions of given log-probabilities: the methods of its own trainers,
called on stand-ins for trainer and model."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer


class Fixed(nn.Module):
    """A model that answers with log-probabilities it was given."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs: Tensor) -> None:
        super().__init__()
        self.logprobs = logprobs

    def forward(self, **_: Any) -> SimpleNamespace:
        zero = torch.zeros_like(self.logprobs)
        return SimpleNamespace(
            log_probs=self.logprobs, entropy=zero, mean_logits=zero, is_top1=zero.bool(),
            logits=self.logprobs,
        )  # fmt: skip


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )


def dpo(
    kind: str, beta: float, smoothing: float, logprobs: Tensor, reference: Tensor, mask: Tensor,
    sft_weight: float = 0.0,
) -> Tensor:  # fmt: skip
    """Mean loss of P pairs.

    Args:
        logprobs: ``[2P, S]`` of the target tokens, zero where ``mask`` is; chosen answers first,
            then the rejected ones in the same order.
        mask: ``[2P, S]``, whether there is a target token.
    """
    kinds = [kind, "sft"] if sft_weight else [kind]
    me = SimpleNamespace(
        accelerator=accelerator(), aux_loss_enabled=False, model=Fixed(logprobs),
        ref_model=Fixed(reference), ld_alpha=None, precompute_ref_logps=False,
        f_divergence_type="reverse_kl", beta=beta, loss_types=kinds,
        loss_weights=[1.0, sft_weight][: len(kinds)], label_smoothing=smoothing,
        use_weighting=False, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
    )  # fmt: skip
    # A first token, which nothing predicts, stands before the S targets.
    ids = torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.long)
    completion = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": completion}
    return DPOTrainer._compute_loss(me, Fixed(logprobs), inputs, False)


def simpo(beta: float, gamma: float, smoothing: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """[P] losses of mean log-probabilities ``[P]``."""
    me = SimpleNamespace(
        accelerator=accelerator(), alpha=0.0, beta=beta, loss_type="simpo", simpo_gamma=gamma,
        label_smoothing=smoothing,
    )  # fmt: skip
    return CPOTrainer.cpo_loss(me, chosen, rejected)[0]


def orpo(beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """[P] losses of mean log-probabilities ``[P]``, without the cross entropy."""
    me = SimpleNamespace(accelerator=accelerator(), beta=beta)
    return -ORPOTrainer.odds_ratio_loss(me, chosen, rejected)[0]


def kto(
    beta: float,
    good_weight: float,
    bad_weight: float,
    good: Tensor,
    mask: Tensor,
    logprobs: Tensor,
    reference: Tensor,
) -> tuple[Tensor, float]:
    """(mean loss of N samples, estimate of the divergence).

    Args:
        good: ``[N]`` bool.
        mask: ``[2, N, S]``: whether there is a target token, in the samples and in the mismatched
            sequences.
        logprobs: ``[2, N, S]``, zero where ``mask`` is.
    """
    ids = torch.ones(mask.shape[1], mask.shape[2] + 1, dtype=torch.long)
    first = torch.zeros(len(ids), 1, dtype=torch.long)
    batch: dict[str, Any] = {"label": good}
    for prefix, own in (("", mask[0]), ("KL_", mask[1])):
        batch[f"{prefix}input_ids"] = batch[f"{prefix}attention_mask"] = ids
        batch[f"{prefix}completion_mask"] = torch.cat([first, own.long()], 1)
    me = SimpleNamespace(
        accelerator=accelerator(), model=InTurn(logprobs), ref_model=InTurn(reference),
        aux_loss_enabled=False, precompute_ref_logps=False, calculate_KL=True, loss_type="kto",
        beta=beta, desirable_weight=good_weight, undesirable_weight=bad_weight,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        _tp_size=1, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    me._compute_kl_logps = lambda model, inputs: KTOTrainer._compute_kl_logps(me, model, inputs)
    loss = KTOTrainer._compute_loss(me, me.model, batch, False)
    return loss, me._metrics["train"]["kl"][0]


class InTurn(Fixed):
    """Answers for the mismatched sequences first, then for the samples, as KTO asks."""

    def forward(self, **_: Any) -> SimpleNamespace:
        self.asked = not getattr(self, "asked", False)
        zero = torch.zeros_like(self.logprobs[0])
        own = self.logprobs[1 if self.asked else 0]
        return SimpleNamespace(log_probs=own, entropy=zero, mean_logits=zero)


def reward(scores: Tensor, margin: Tensor, centre: float | None) -> Tensor:
    """Mean loss of P pairs; ``scores [2P, 1]``, chosen answers first; ``margin [P]``."""
    model = Fixed(scores)
    me = SimpleNamespace(
        model=model, accelerator=accelerator(), _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(center_rewards_coefficient=centre),
    )  # fmt: skip
    inputs = {"attention_mask": torch.ones(len(scores), 1), "margin": margin}
    return RewardTrainer.compute_loss(me, model, inputs)


def gkd(logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float) -> Tensor:
    """Mean distance of N places; logits ``[N, V]``. ``beta``: 0 is KL(teacher || student), 1 is
    KL(student || teacher)."""
    return GKDTrainer.generalized_jsd_loss(
        logits[None], teacher_logits[None], torch.zeros(1, len(logits)), beta, temperature
    )
