"""V3: six adapters of which vLLM should load only the first.

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
hf.Qwen3ForCausalLM(
    hf.Qwen3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
).save_pretrained("base")
Q = "model.layers.0.self_attn.q_proj"


def adapter(folder, module=Q, n_in=64, n_out=64, r=4, factor=0.1):
    os.makedirs(folder, exist_ok=True)
    tensors = {
        f"{module}.lora_A.weight": torch.ones(4, n_in) * factor,
        f"{module}.lora_B.weight": torch.ones(n_out, 4) * factor,
    }
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    json.dump(
        {"r": r, "lora_alpha": 16, "target_modules": []}, open(f"{folder}/adapter_config.json", "w")
    )


llm = LLM(
    "base",
    dtype="float32",
    skip_tokenizer_init=True,
    enforce_eager=True,
    enable_lora=True,
    lora_target_modules=["qkv_proj"],
)


def ask(*loras):  # log-probability of the likeliest next token, one request for each
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=0, detokenize=False)
    outs = llm.generate(
        [{"prompt_token_ids": [*range(20)]}] * len(loras),
        params,
        lora_request=[*loras],
        use_tqdm=False,
    )
    return [round(out.outputs[0].cumulative_logprob, 4) for out in outs]


print("base", ask(None))
cases = {
    "sound": {},
    "lm_head": {"module": "lm_head", "n_out": 320},
    "layer 7 of 2": {"module": Q.replace("0", "7")},
    "r=8 in config": {"r": 8},
    "40 inputs of 64": {"n_in": 40},
    "NaN": {"factor": float("nan")},
}
for i, (name, options) in enumerate(cases.items(), 1):
    adapter(name, **options)
    lora = LoRARequest(name, i, name)
    print(name, "loaded:", llm.llm_engine.add_lora(lora), ask(lora))
# printed:
# base [-1.9228]
# sound loaded: True [-2.6361]
# lm_head loaded: True [-1.9228]
# layer 7 of 2 loaded: True [-1.9228]
# r=8 in config loaded: True [-2.1929]
# 40 inputs of 64 loaded: True [-1.925]
# NaN loaded: True [nan]
