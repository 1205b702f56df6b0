"""List fields of ``config.json`` that must be refused, family by family.

Each entry is a published config's family, the fields that are changed in it (``...`` removes one),
and a part of the message.
"""

from typing import Any

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # Known, and with a value that is not computed.
    (
        "qwen3_moe",
        {"hidden_act": "gelu"},
        'hidden_act="gelu"; it must be "silu" or "swish": MLPs and experts',
    ),
    # Null is not "absent": transformers would fail to build the activation, not take the default.
    ("qwen3", {"hidden_act": None}, 'hidden_act=null; it must be "silu"'),
    (
        "qwen3",
        {"attention_dropout": 0.1},
        "attention_dropout=0.1; it must be 0: attention has no dropout here",
    ),
    (
        "qwen3_moe",
        {"use_sliding_window": True},
        "use_sliding_window=true; it must be false: attention sees the whole",
    ),
    (
        "qwen3_moe",
        {"output_router_logits": True},
        "output_router_logits=true; it must be false: it adds a balancing",
    ),
    # transformers 5 lists the kind of every layer: 28 in this model. One of another kind, and one
    # too few.
    (
        "qwen3",
        {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
        "must be full_attention for each of the 28",
    ),
    (
        "qwen3",
        {"layer_types": ["full_attention"] * 27},
        "must be full_attention for each of the 28",
    ),
    # A reward model: the same layers under another head.
    (
        "qwen3",
        {"architectures": ["Qwen3ForSequenceClassification"]},
        "a qwen3 model is trained as Qwen3ForCausalLM",
    ),
    ("qwen3_moe", {"norm_topk_prob": "yes"}, 'norm_topk_prob="yes"; it must be true or false'),
    # A single chosen expert's weight divided by itself is 1, so the router could not matter.
    (
        "qwen3_moe",
        {"norm_topk_prob": True, "num_experts_per_tok": 1},
        "norm_topk_prob=true with num_experts_per_tok=1",
    ),
    (
        "qwen3",
        {"use_qk_norm": False, "qk_norm": False},
        "use_qk_norm=false; it must be true: this family has norms",
    ),
    (
        "qwen3",
        {"is_causal": False},
        "is_causal=false; it must be true: every token sees the tokens before it alone",
    ),
    ("qwen3_moe", {"is_causal": None}, "is_causal=null; it must be true"),
    # Of another family (Qwen2, Llama, Qwen2-MoE, Mixtral, DeepSeek, Cohere), or of nobody.
    (
        "qwen2_moe",
        {"attention_bias": True},
        "attention_bias=true, a field megalora does not know for qwen2_moe",
    ),
    (
        "qwen3_moe",
        {"qkv_bias": True},
        "qkv_bias=true, a field megalora does not know for qwen3_moe",
    ),
    ("qwen3_moe", {"mlp_bias": True}, "mlp_bias=true, a field megalora does not know"),
    (
        "qwen3_moe",
        {"shared_expert_intermediate_size": 512},
        "shared_expert_intermediate_size=512, a field megalora",
    ),
    ("qwen3", {"num_experts": 8}, "num_experts=8, a field megalora does not know for qwen3;"),
    ("qwen2_moe", {"num_local_experts": 8}, "num_local_experts=8, a field megalora does not know"),
    (
        "qwen3_moe",
        {"scoring_func": "sigmoid"},
        'scoring_func="sigmoid", a field megalora does not know',
    ),
    ("qwen3_moe", {"n_group": 8}, "n_group=8, a field"),
    ("qwen3_moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5, a field"),
    ("qwen3", {"logit_scale": 0.1}, "logit_scale=0.1, a field"),
    (
        "qwen3",
        {"dual_chunk_attention_config": {"chunk_size": 8}},
        'dual_chunk_attention_config={"chunk_size": 8}, a field',
    ),
    # Code of the folder's own computes something else.
    ("qwen3", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map="),
    # Phi-3 keeps this beside its rotary settings, where it changes the frequencies.
    (
        "qwen3",
        {"original_max_position_embeddings": 32768},
        "original_max_position_embeddings=32768, a field",
    ),
    # A misspelt field changes nothing, and the default is used in its place: worth a guess.
    (
        "qwen3",
        {"rms_norm_epsilon": 1e-5},
        (
            "rms_norm_epsilon=1e-05, a field megalora does not know for qwen3; what it does to"
            " the model would be ignored. Did you mean rms_norm_eps? If it does nothing, remove it"
        ),
    ),
    # Quantised, by the fields of transformers, compressed-tensors and MLX.
    (
        "qwen3",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config, of which megalora does not read this: group_size is missing; use",
    ),
    (
        "qwen3",
        {"compression_config": {"format": "int"}},
        "compression_config: these weights are quantised",
    ),
    (
        "qwen3",
        {"quantization": {"group_size": 64, "bits": 4}},
        "quantization: these weights are quantised",
    ),
    # Values that no model can have.
    ("qwen3", {"rms_norm_eps": float("inf")}, "rms_norm_eps=Infinity; it must be a number above 0"),
    ("qwen3", {"rope_theta": float("nan")}, "rope_theta=nan; it must be a number above 1"),
    ("qwen3", {"vocab_size": None}, "vocab_size=null; it must be a whole number of at least 1"),
    (
        "qwen3",
        {"hidden_size": "1024"},
        'hidden_size="1024"; it must be a whole number of at least 1',
    ),
    (
        "qwen3",
        {"num_hidden_layers": 0},
        "num_hidden_layers=0; it must be a whole number of at least 1",
    ),
    # Some remote-code models have a number of heads for each layer.
    ("qwen3", {"num_attention_heads": [16]}, "num_attention_heads=[16]; it must be"),
    # True is 1 in Python.
    ("qwen3", {"num_hidden_layers": True}, "num_hidden_layers=true; it must be"),
    # Rotary embedding turns pairs of features.
    ("qwen3", {"head_dim": 127}, "head_dim=127; it must be an even number of at least 2"),
    # Grouped-query attention: a whole number of query heads for each key/value head.
    (
        "qwen3",
        {"num_key_value_heads": 3},
        "num_attention_heads=16 is not a multiple of num_key_value_heads=3",
    ),
    ("qwen3", {"rms_norm_eps": 0}, "rms_norm_eps=0; it must be a number above 0"),
    # YAML reads 1e-6 without a dot as text, and some write config.json from YAML.
    ("qwen3", {"rms_norm_eps": "1e-6"}, 'rms_norm_eps="1e-6"; it must be a number above 0'),
    (
        "qwen3",
        {"tie_word_embeddings": "true"},
        'tie_word_embeddings="true"; it must be true or false, or null',
    ),
    (
        "qwen3",
        {"max_position_embeddings": 1e6},
        "max_position_embeddings=1000000.0; it must be a whole number",
    ),
    (
        "qwen3_moe",
        {"mlp_only_layers": -1},
        "mlp_only_layers=-1; it must be a list of layer numbers from 0 on, or null",
    ),
    (
        "qwen3_moe",
        {"mlp_only_layers": [-1]},
        "mlp_only_layers=[-1]; it must be a list of layer numbers",
    ),
    (
        "qwen3_moe",
        {"decoder_sparse_step": "F8"},
        'decoder_sparse_step="F8"; it must be a whole number of at least 1',
    ),
    (
        "qwen3_moe",
        {"decoder_sparse_step": 0},
        "decoder_sparse_step=0; it must be a whole number of at least 1",
    ),
    (
        "qwen3_moe",
        {"num_experts_per_tok": 129},
        "num_experts_per_tok=129 is more than num_experts=128",
    ),
    # Mixtral's name for the number of experts, which transformers also reads for Qwen3-MoE.
    (
        "qwen3_moe",
        {"num_local_experts": 64},
        "num_experts=128 and num_local_experts=64; they are one field",
    ),
    ("qwen3_moe", {"attention_bias": 1}, "attention_bias=1; it must be true or false"),
    ("qwen2_moe", {"qkv_bias": None}, "qkv_bias=null; it must be true or false"),
    # 2,048 features for 12 heads would be 170.67 each.
    (
        "qwen2_moe",
        {"head_dim": None, "num_attention_heads": 12, "num_key_value_heads": 12},
        "config.json has no head_dim",
    ),
    # Llama: biases of attention are computed, those of the MLP are not.
    ("llama", {"mlp_bias": True}, "mlp_bias=true; it must be false: linears of the MLP"),
    ("llama", {"attention_bias": 1}, "attention_bias=1; it must be true or false"),
    (
        "llama",
        {"sliding_windows": 4},
        "sliding_windows=4, a field megalora does not know for llama",
    ),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "whose frequencies depend on the length"),
    # Mistral and Mixtral: a window as long as the positions, or none, is full attention. An absent
    # field is the trap, because transformers' default is a window of 4,096.
    (
        "mistral",
        {"sliding_window": 4096},
        "sliding_window=4096 with max_position_embeddings=32768: attention would see 4096 tokens",
    ),
    ("mistral", {"sliding_window": ...}, "no sliding_window, for which transformers takes 4096"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0; it must be a whole number of at least 1"),
    ("mistral", {"attention_bias": True}, "attention_bias=true, a field megalora does not know"),
    (
        "mixtral",
        {"sliding_window": 4096},
        "sliding_window=4096 with max_position_embeddings=32768: attention would see 4096 tokens",
    ),
    (
        "mixtral",
        {"router_jitter_noise": 0.01},
        "router_jitter_noise=0.01; it must be 0: hidden states are not multiplied with noise",
    ),
    ("mixtral", {"output_router_logits": True}, "output_router_logits=true; it must be false"),
    # Mixtral always normalises over the chosen experts and has no field for it.
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1: weights of the chosen experts"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_experts"),
    ("mixtral", {"num_experts": 8}, "num_experts=8, a field megalora does not know for mixtral"),
    ("mixtral", {"norm_topk_prob": True}, "norm_topk_prob=true, a field megalora does not know"),
    ("mixtral", {"attention_bias": True}, "attention_bias=true, a field megalora does not know"),
    ("mixtral", {"hidden_act": "gelu"}, 'hidden_act="gelu"; it must be "silu"'),
]
