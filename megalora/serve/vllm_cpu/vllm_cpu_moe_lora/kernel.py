"""Put ``experts.py`` behind vLLM's interface, in the place where vLLM looks for Triton's.

Importing this imports much of vLLM.
"""

from __future__ import annotations

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from vllm_cpu_moe_lora.experts import Factors, apply_experts


class TorchLoRAExperts(LoRAExpertsMixin, mk.FusedMoEExpertsModular):
    """Experts with LoRA for vLLM's layers.

    Tensor parallelism works as in vLLM's own: slots hold this rank's rows of B1 and columns of A2.
    """

    expects_unquantized_inputs = True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key, activation_key) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config) -> bool:
        return not moe_parallel_config.use_ep

    def workspace_shapes(self, M, N, K, *args, **kwargs):
        # No scratch memory; the output is [tokens, hidden].
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self):
        # ``apply`` has weighted and summed.
        return TopKWeightAndReduceNoOP()

    def set_lora_context(self, ctx) -> None:
        if ctx.fully_sharded or ctx.enable_moe_shared_loras:
            raise NotImplementedError(
                "fully_sharded_loras and enable_moe_shared_loras are not supported on vLLM's CPU"
                " build; leave both out"
            )
        super().set_lora_context(ctx)

    def apply(
        self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
        expert_map,
        a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta,
        apply_router_weight_on_input,
    ) -> None:  # fmt: skip
        unsupported = {
            f"activation {activation}": activation != MoEActivation.SILU,
            "expert parallelism": expert_map is not None,
            "router weights on the input": apply_router_weight_on_input,
            "expert biases": self.w1_bias is not None or self.w2_bias is not None,
        }
        names = [name for name, is_asked_for in unsupported.items() if is_asked_for]
        if names:
            raise NotImplementedError(
                f"MoE LoRA on vLLM's CPU build does not support {', '.join(names)}"
            )
        slots_T, factors = _slots_and_factors(self._lora_context, topk_ids)
        output.copy_(apply_experts(hidden_states, w1, w2, topk_weights, topk_ids, slots_T, factors))


def _slots_and_factors(ctx, experts_TK: Tensor) -> tuple[Tensor, Factors]:
    """Slots of the tokens and factors of all slots, from vLLM's context."""
    num_tokens = experts_TK.shape[0]
    # ``--lora-target-modules`` leaves the experts out: every token gets the bare base.
    if ctx is None:
        return torch.full((num_tokens,), -1), Factors((), (), (), ())
    slots_T = ctx.punica_wrapper.token_lora_indices
    # Leaving adapters out here would be a wrong answer that nobody notices.
    if slots_T.numel() < num_tokens:
        raise RuntimeError(
            f"{num_tokens} tokens, but vLLM named adapters for {slots_T.numel()} of them only"
        )
    factors = Factors(
        ctx.w13_lora_a_stacked, ctx.w13_lora_b_stacked, ctx.w2_lora_a_stacked, ctx.w2_lora_b_stacked
    )
    return slots_T[:num_tokens], factors


def install() -> None:
    """Replace Triton's experts, vLLM's only choice for unquantized ones with LoRA on."""
    triton = unquantized.UnquantizedMoeBackend.TRITON
    others = unquantized.backend_to_kernel_cls

    def backend_to_kernel_cls(backend):
        return [TorchLoRAExperts] if backend == triton else others(backend)

    # ``select_unquantized_moe_backend`` looks the class up by this name of its own module.
    unquantized.backend_to_kernel_cls = backend_to_kernel_cls
