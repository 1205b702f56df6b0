"""TRL's policy losses as functions of given log-probabilities: the methods of its own trainers,
called on a stand-in for the trainer."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer


class One:
    """What the method asks of accelerate, for one process."""

    num_processes = 1
    sync_gradients = True

    @staticmethod
    def gather(x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    @staticmethod
    def reduce(x: Tensor, reduction: str = "sum") -> Tensor:
        return x


def loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: str,
    level: str = "token",
    low: float = 0.2,
    high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    reference: Tensor | None = None,
    corrected: bool = False,
    weights: Tensor | None = None,
    sampling: Tensor | None = None,
    threshold: float | None = None,
    max_length: int | None = None,
    entropies: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """(loss of one batch, what TRL logs).

    Args:
        logprobs: ``[N, T]``, as all that is by token; ``mask`` is 1 on learned ones.
        advantages: ``[N]`` or ``[N, T]``.
        kind: ``loss_type``, or ``gmpo``.
        weights: importance ratios between engine and trainer; None for no correction.
        sampling: log-probabilities of the engine, for ``threshold``.
        threshold: ``off_policy_mask_threshold``.
    """
    if entropies is None:
        entropies = torch.zeros_like(logprobs)
    logged: Any = defaultdict(list)
    me = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, entropies, None),
        top_entropy_quantile=1.0, off_policy_mask_threshold=threshold,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        importance_sampling_level=level, beta=beta, loss_type=kind, epsilon_low=low,
        epsilon_high=high, use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        max_completion_length=max_length, current_gradient_accumulation_steps=1,
        accelerator=One(), aux_loss_enabled=False, _entropy_bonus_enabled=entropy_coef > 0,
        use_adaptive_entropy=False, entropy_coef=entropy_coef,
        model=SimpleNamespace(training=True), _metrics={"train": logged},
        args=SimpleNamespace(
            delta=delta, use_bias_correction_kl=corrected, steps_per_generation=1,
            sapo_temperature_pos=0.75, sapo_temperature_neg=1.25, vespo_k_pos=2.0,
            vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
        ),
    )  # fmt: skip
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs: dict[str, Any] = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids,
        "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(), "ref_per_token_logps": reference,
    }  # fmt: skip
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    if sampling is not None:
        inputs["sampling_per_token_logps"] = sampling
    trainer = GMPOTrainer if kind == "gmpo" else GRPOTrainer
    found = trainer._compute_loss(me, None, inputs)
    return found, {name: values[-1] for name, values in logged.items()}
