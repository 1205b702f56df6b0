"""V1: an MoE model with enable_lora=True on vLLM's CPU build.

What is wrong stands in docs/upstream.md."""

import os

import transformers as hf

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)
from vllm import LLM, SamplingParams

hf.set_seed(0)
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
llm = LLM(
    "base", dtype="float32", skip_tokenizer_init=True, enforce_eager=True, enable_lora=True
)  # enable_lora=False: works
params = SamplingParams(max_tokens=4, temperature=0, detokenize=False)
print(llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)[0].outputs[0].token_ids)
# printed:
# AttributeError: module 'triton.language' has no attribute 'float32'
