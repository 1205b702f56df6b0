"""Compare routers with transformers' own, in values and gradients; training must not move their
biases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

from megalora.config import LoRAConfig
from megalora.model.router import route_by_sigmoid
from megalora.tiny import make_tiny
from megalora.train.optim import clip_and_step
from tests.distributed.ranks import run_ranks
from tests.oracles.base import stored_tensors
from tests.parity.built import built
from tests.parity.runs import make_config


# 12 experts: in one group, as GLM-4.5 is published; four groups of three, of which two or three may
# be chosen from; all six of one group; a single expert.
@pytest.mark.parametrize(
    ("num_groups", "group_topk", "top_k"), [(1, 1, 4), (4, 2, 3), (4, 3, 5), (2, 1, 6), (3, 2, 1)]
)
def test_corrected_sigmoids_choose_and_weigh_as_in_transformers(num_groups, group_topk, top_k):
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "n_group": num_groups, "topk_group": group_topk, "num_experts_per_tok": top_k,
        "n_routed_experts": 12, "routed_scaling_factor": 2.5, "hidden_size": 8,
        "moe_intermediate_size": 4,
    }  # fmt: skip
    theirs: Any = Glm4MoeMoE(Glm4MoeConfig(**options)).double()
    # As large as differences of sigmoids, so that it changes choices; it must not change weights.
    bias_E = 0.3 * torch.randn(12, dtype=torch.float64)
    theirs.gate.e_score_correction_bias.copy_(bias_E)
    logits_TE = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    # transformers gives the chosen experts, Megatron wants a column for each expert.
    index_TK, weights_TK = theirs.route_tokens_to_experts(logits_TE)
    expected_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, weights_TK)
    probs_TE, map_TE = route_by_sigmoid(
        logits_TE, bias_E, top_k, num_groups=num_groups, group_topk=group_topk, scale=2.5
    )
    assert torch.equal(map_TE, torch.zeros_like(map_TE).scatter(1, index_TK, True))
    # Float64 on both sides, in the same order of operations.
    torch.testing.assert_close(probs_TE, expected_TE, rtol=1e-12, atol=0)
    target_TE = torch.randn_like(logits_TE)
    # d loss / d logits where the loss is the sum of probabilities weighted at random. A plain sum
    # would have no gradient: weights are normalised to 2.5 for each token.
    (ours,) = torch.autograd.grad((probs_TE * target_TE).sum(), logits_TE)
    (reference,) = torch.autograd.grad((expected_TE * target_TE).sum(), logits_TE)
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def _biases_before_and_after(config: Any) -> list[tuple[torch.dtype, float, float]]:
    """(dtype, largest value, largest change over two steps) of every router's correction bias."""
    with built(config) as run:

        def biases() -> list[torch.Tensor]:
            found = []
            for chunk in run.model.chunks:
                named = chunk.named_buffers()
                found.extend(buffer for name, buffer in named if "expert_bias" in name)
            return found

        before = [bias.clone() for bias in biases()]
        for step in range(2):
            run.stepper.train(run.batches.of_step(step), run.optimizer)
            clip_and_step(run.optimizer)
        found = []
        # Asked for again: a module may have another buffer by now.
        for bias, earlier in zip(biases(), before, strict=True):
            change = (bias - earlier).abs().max().item()
            found.append((bias.dtype, bias.abs().max().item(), change))
        return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_correction_biases_stay_as_stored(dtype: str, chats: Path, tmp_path: Path) -> None:
    """In float32 whatever the model's dtype, and the same bits after training steps."""
    # Megatron would cast it to bfloat16 with the model; its finalize_model_grads, not called here,
    # would move it by the load of each expert.
    base = make_tiny(tmp_path / "glm", arch="glm4_moe", num_hidden_layers=2)
    # With the router adapted, so that its gradients exist.
    lora = LoRAConfig(rank=4, target_modules=["gate", "q_proj", "down_proj"])
    config = make_config(base, chats, tmp_path / "run", {"tp": 2}, lora=lora, dtype=dtype)
    stored = stored_tensors(base)["model.layers.1.mlp.gate.e_score_correction_bias"]
    for found in run_ranks(_biases_before_and_after, 2, config):
        # Layer 1 alone has a router.
        assert found == [(torch.float32, stored.abs().max().item(), 0.0)]
