"""Give router adapters their effect: vLLM 0.32 loads them, and routes by the bare gate.

A MoE block's gate is reachable by two names: ``mlp.gate`` and, because ``MoERunner`` computes the
logits itself, ``mlp.experts.gate``. ``LoRAModelManager._create_lora_modules`` wraps the first, and
means to put the wrapper under the second too; but by then ``mlp.experts`` is ``FusedMoEWithLoRA``,
so the wrapper lands beside the runner instead of in it. Nothing in this depends on the platform: on
GPUs the runner calls ``self.gate`` from the same method, inside one opaque operator.
"""

from __future__ import annotations


def install() -> None:
    from vllm.lora.model_manager import LoRAModelManager

    create_modules = LoRAModelManager._create_lora_modules

    def create_modules_and_rewire(self) -> None:
        create_modules(self)
        rewire_gates(self.model)

    LoRAModelManager._create_lora_modules = create_modules_and_rewire


def rewire_gates(model) -> int:
    """Put each wrapped gate into the runner that uses it; returns how many there were.

    Raises:
        NotImplementedError: the runner multiplies by the gate's weights itself (shared expert's
            gate fused in), so that an adapter could not reach it.
    """
    from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA

    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, FusedMoEWithLoRA):
            continue
        # Beside the runner, where vLLM has put it. Absent or bare: the gate is not adapted.
        gate = module._modules.get("gate")
        if not isinstance(gate, BaseLayerWithLoRA):
            continue
        if module.base_layer._fse_fuse_gate:
            raise NotImplementedError(
                f"{name}: vLLM fuses this model's router with the shared expert's gate, which"
                " leaves no place for a router adapter; name the modules to adapt without 'gate'"
                " in --lora-target-modules"
            )
        module.base_layer.gate = gate
        count += 1
    return count
