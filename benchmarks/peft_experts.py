"""Put the tensors of a case into stock PEFT on stock transformers. This imports both, which takes
seconds, so it is imported by that arm alone."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.expert_case import SCALE, Case, Tensors


def adapted_experts(case: Case) -> tuple[nn.Module, Tensors]:
    """Transformers' experts with the case's weights and PEFT's adapters, and the factors by the
    names of ``Case.leaves``.

    PEFT wraps the module for gate_up_proj, and the wrapper once more for down_proj. Rows of A go
    expert by expert, ``[E R, K]``; columns of B rank by rank, ``[N, R E]``.
    """
    sizes = case.spec.sizes
    holder = nn.Module()
    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden, moe_intermediate_size=sizes.inner, num_experts=case.spec.experts,
        num_experts_per_tok=case.expert_of_slot.shape[1],
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    # Without memory: its own weights would be as large as the case's, which take their place.
    with torch.device("meta"):
        holder.experts = Qwen3MoeExperts(config)
    holder.experts.gate_up_proj = nn.Parameter(case.w1, requires_grad=False)
    holder.experts.down_proj = nn.Parameter(case.w2, requires_grad=False)
    adapters = LoraConfig(
        r=case.spec.rank, lora_alpha=SCALE * case.spec.rank, target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    inject_adapter_in_model(adapters, holder)
    factors: Tensors = {}
    for number, wrapper in (("1", holder.experts.base_layer), ("2", holder.experts)):
        a = wrapper.get_submodule("lora_A.default")
        b = wrapper.get_submodule("lora_B.default")
        # Clones: training this arm must leave the case's own factors as they are.
        a.weight = nn.Parameter(case.leaves[f"a{number}"].detach().flatten(0, 1).clone())
        b.weight = nn.Parameter(
            case.leaves[f"b{number}"].detach().permute(1, 2, 0).flatten(1).clone()
        )
        factors |= {f"a{number}": a.weight, f"b{number}": b.weight}
    return holder.experts, factors


def to_common(case: Case, found: Tensors) -> Tensors:
    """Gradients in the shapes of ``Case.leaves``."""
    assert case.routing.slots_TK is not None
    # transformers has probabilities by token and slot, ours are in the order of the routed rows.
    dp = torch.empty_like(case.leaves["p"])
    dp[case.routing.slots_TK.long()] = found["p"]
    mine = {"out": found["out"], "x": found["x"], "p": dp}
    for number in ("1", "2"):
        mine[f"a{number}"] = found[f"a{number}"].unflatten(0, (case.spec.experts, -1))
        mine[f"b{number}"] = (
            found[f"b{number}"].unflatten(1, (-1, case.spec.experts)).permute(2, 0, 1)
        )
    return mine
