"""V8: a request to the base in one batch with one to an adapter, on vLLM's CPU build.

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


def adapter(folder, module, n_out=64):
    os.makedirs(folder, exist_ok=True)
    tensors = {
        f"{module}.lora_A.weight": torch.randn(4, 64) / 4,
        f"{module}.lora_B.weight": torch.randn(n_out, 4) / 4,
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


adapter("one", "model.layers.0.self_attn.q_proj")
one = LoRARequest("one", 1, "one")
print("alone:   ", ask(None), ask(one))
print("together:", ask(None, one))
# printed:
# alone:    [-1.9228] [-1.5006]
# together: [-1.5006, -1.5006]
