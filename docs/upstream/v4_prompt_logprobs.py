"""V4: prompt_logprobs of two requests with adapters of lm_head, alone and together, in vLLM.

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


llm = LLM(
    "base",
    dtype="float32",
    skip_tokenizer_init=True,
    enforce_eager=True,
    enable_lora=True,
    max_loras=2,
)
loras = [LoRARequest(name, i, name) for i, name in enumerate(["one", "two"], 1)]
for lora in loras:
    adapter(lora.lora_name, "lm_head", 320)


def ask(prompt, loras):  # prompt_logprobs, one request for each adapter
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outs = llm.generate(
        [{"prompt_token_ids": prompt}] * len(loras), params, lora_request=loras, use_tqdm=False
    )
    return [
        [round(row[t].logprob, 4) for row, t in zip(out.prompt_logprobs[1:], prompt[1:])]
        for out in outs
    ]


print("alone:   ", ask([5, 6, 7], loras[:1]), ask([5, 6, 7], loras[1:]))
print("together:", ask([5, 6, 7], loras))
try:
    ask([5, 6, 7, 8], loras)
except RuntimeError as error:
    print("four tokens:", error)
# printed:
# alone:    [[-17.4286, -11.6737]] [[-11.9195, -16.1187]]
# together: [[-17.4286, -16.1187], [-17.4286, -16.1187]]
# four tokens: einsum(): subscript b has size 2 for operand 1 ...
