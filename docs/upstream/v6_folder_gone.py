"""V6: an evicted adapter whose folder is gone, in vLLM.

What is wrong stands in docs/upstream.md."""

import json
import os
import shutil

import torch
import transformers as hf

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="1",
    VLLM_LOGGING_LEVEL="ERROR",
)
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


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


def ask(*loras):  # log-probability of the likeliest next token, one request for each
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=0, detokenize=False)
    outs = llm.generate(
        [{"prompt_token_ids": [*range(20)]}] * len(loras),
        params,
        lora_request=[*loras],
        use_tqdm=False,
    )
    return [round(out.outputs[0].cumulative_logprob, 4) for out in outs]


if __name__ == "__main__":
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
    for name in ("one", "two"):
        adapter(name, "model.layers.0.self_attn.q_proj")
    llm = LLM(
        "base",
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=1,
    )
    one, two = LoRARequest("one", 1, "one"), LoRARequest("two", 2, "two")
    print("one:", ask(one), "two:", ask(two))  # two takes one's place in memory
    shutil.rmtree("one")
    for lora in (one, two, None):
        try:
            print(lora and lora.lora_name, ask(lora))
        except Exception as error:
            print(lora and lora.lora_name, repr(error))
# printed:
# one: [-2.683] two: [-2.2557]
# one EngineDeadError('EngineCore encountered an issue..')
# two EngineDeadError('EngineCore encountered an issue..')
# None EngineDeadError('EngineCore encountered an issue..')
