"""V5: an adapter that lacks an expert, in vLLM.

What is wrong stands in docs/upstream.md."""

import json
import os

import torch
import transformers as hf

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)
from safetensors.torch import save_file
from vllm import LLM
from vllm.lora.request import LoRARequest

torch.manual_seed(0)
hf.Qwen3MoeForCausalLM(
    hf.Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=64,
        moe_intermediate_size=24,
        num_experts=4,
        head_dim=32,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
).save_pretrained("base")


def adapter(folder, experts):
    os.makedirs(folder, exist_ok=True)
    tensors = {}
    for e in experts:
        for name, n_in, n_out in (
            ("gate_proj", 64, 24),
            ("up_proj", 64, 24),
            ("down_proj", 24, 64),
        ):
            module = f"model.layers.0.mlp.experts.{e}.{name}"
            tensors |= {
                f"{module}.lora_A.weight": torch.randn(4, n_in),
                f"{module}.lora_B.weight": torch.randn(n_out, 4),
            }
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    json.dump(
        {"r": 4, "lora_alpha": 16, "target_modules": []}, open(f"{folder}/adapter_config.json", "w")
    )


llm = LLM("base", dtype="float32", skip_tokenizer_init=True, enforce_eager=True, enable_lora=True)
for i, experts in enumerate([[0, 1, 2, 3], [0, 1, 2]], 1):
    adapter(f"adapter{i}", experts)
    try:
        print(
            experts,
            "loaded:",
            llm.llm_engine.add_lora(LoRARequest(f"adapter{i}", i, f"adapter{i}")),
        )
    except Exception as error:
        print(experts, repr(error))
# printed:
# [0, 1, 2, 3] loaded: True
# [0, 1, 2] AssertionError()
