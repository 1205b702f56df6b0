"""V2: an adapter of the router beside one of the query projection, in vLLM.

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
from vllm import LLM, SamplingParams
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


def adapter(folder, module, n_out=64):
    os.makedirs(folder, exist_ok=True)
    tensors = {
        f"{module}.lora_A.weight": torch.randn(4, 64),
        f"{module}.lora_B.weight": torch.randn(n_out, 4),
    }
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    json.dump(
        {"r": 4, "lora_alpha": 16, "target_modules": []}, open(f"{folder}/adapter_config.json", "w")
    )


llm = LLM("base", dtype="float32", skip_tokenizer_init=True, enforce_eager=True, enable_lora=True)


def ask(*loras):  # log-probability of the likeliest next token, one request for each
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=0, detokenize=False)
    outs = llm.generate(
        [{"prompt_token_ids": [*range(20)]}] * len(loras),
        params,
        lora_request=[*loras],
        use_tqdm=False,
    )
    return [round(out.outputs[0].cumulative_logprob, 4) for out in outs]


adapter("router", "model.layers.0.mlp.gate", 4)
adapter("query", "model.layers.0.self_attn.q_proj")
for i, name in enumerate(["router", "query"], 1):
    lora = LoRARequest(name, i, name)
    print(name, "loaded:", llm.llm_engine.add_lora(lora), "base:", ask(None), "adapter:", ask(lora))
# printed:
# router loaded: True base: [-2.8862] adapter: [-2.8862]
# query loaded: True base: [-2.8862] adapter: [-2.5414]
