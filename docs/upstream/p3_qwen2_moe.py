"""P3: per-expert adapters of Qwen2-MoE, in PEFT.

What is wrong stands in docs/upstream.md."""

import copy
import json
import os

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

torch.manual_seed(0)
base = Qwen2MoeForCausalLM(
    Qwen2MoeConfig(
        vocab_size=320,
        hidden_size=64,
        moe_intermediate_size=24,
        num_experts=4,
        num_hidden_layers=1,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
).eval()
merged, tensors = copy.deepcopy(base), {}
G, D = merged.model.layers[0].mlp.experts.gate_up_proj, merged.model.layers[0].mlp.experts.down_proj
weights = {
    f"layers.0.mlp.experts.{e}.{n}": w
    for e in range(4)
    for n, w in (("gate_proj", G[e, :24]), ("up_proj", G[e, 24:]), ("down_proj", D[e]))
}
for name, weight in weights.items():
    a, b = torch.randn(4, weight.shape[1]) / 4, torch.randn(weight.shape[0], 4) / 4
    weight.data += 2 * b @ a
    tensors |= {
        f"base_model.model.model.{name}.lora_A.weight": a,
        f"base_model.model.model.{name}.lora_B.weight": b,
    }
os.makedirs("adapter", exist_ok=True)
save_file(tensors, "adapter/adapter_model.safetensors")
json.dump(
    {
        "peft_type": "LORA",
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 8,
    },
    open("adapter/adapter_config.json", "w"),
)
model = PeftModel.from_pretrained(copy.deepcopy(base), "adapter").eval()
logits, loaded, right = (m(torch.arange(20)[None]).logits for m in (base, model, merged))
print(
    f"loaded - base {(loaded - logits).abs().max():.6f},"
    f" loaded - merged by hand {(loaded - right).abs().max():.6f}"
)
# printed:
# a UserWarning about missing adapter keys
# loaded - base 0.000000, loaded - merged by hand 6.271747
