"""Count the FLOPs that a token takes to train with LoRA in a model of Qwen3-30B-A3B's shape.

    FLOPs per token = 4 P + 6 A + 6 S h d L

P: frozen parameters that a token meets (attention, router, its 8 experts, output layer), with 2
    FLOPs each in forward and 2 in backward for the gradient of the input; the weights get no
    gradient. A: adapter parameters that it meets, with 2 more for their own gradient. S h d L:
    causal attention over S tokens with h heads of width d in L layers, 2 S h d in forward (half of
    the square, two products) and twice that in backward. Nothing is counted twice where activations
    are recomputed.
"""

from typing import Any

QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "vocab_size": 151936, "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6,
    "attention_bias": False, "tie_word_embeddings": False, "output_router_logits": False,
    "router_aux_loss_coef": 0.0, "use_sliding_window": False,
}  # fmt: skip
TINY_MODEL: dict[str, Any] = {
    **QWEN3_30B_A3B, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 128,
}  # fmt: skip
"""The same architecture at sizes for tests and dry runs."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each adapted linear of one layer, with gate, up and down of one
    expert."""
    h = config["hidden_size"]
    width = config["head_dim"]
    q = config["num_attention_heads"] * width
    kv = config["num_key_value_heads"] * width
    inner = config["moe_intermediate_size"]
    attention = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
    return attention | {"gate_proj": (inner, h), "up_proj": (inner, h), "down_proj": (h, inner)}


def met(config: dict[str, Any], sizes: dict[str, int]) -> int:
    """Sum of sizes over the linears of one layer that a token meets: each of attention once, each
    of an expert in its top-k experts."""
    return sum_of_layer(sizes, config["num_experts_per_tok"])


def sum_of_layer(sizes: dict[str, int], num_experts: int) -> int:
    """Sum of sizes over one layer's linears, with so many experts.

    Args:
        sizes: size of each attention linear, and of each linear of one expert.
        num_experts: number of times that an expert's linears count.
    """
    attention = 0
    expert = 0
    for name, size in sizes.items():
        if name in ATTENTION:
            attention += size
        else:
            expert += size
    return attention + num_experts * expert


def weight_sizes(config: dict[str, Any]) -> dict[str, int]:
    """Weights of each linear of ``linears``."""
    sizes = {}
    for name, (outputs, inputs) in linears(config).items():
        sizes[name] = outputs * inputs
    return sizes


def frozen_met(config: dict[str, Any]) -> int:
    """P of the formula; the embedding is looked up, not multiplied."""
    layer = met(config, weight_sizes(config))
    # The router scores every expert.
    layer += config["num_experts"] * config["hidden_size"]
    # The last term is the output layer.
    return config["num_hidden_layers"] * layer + config["vocab_size"] * config["hidden_size"]


def adapter_sizes(
    config: dict[str, Any], rank: int, gate_up_is_one: bool = False
) -> dict[str, int]:
    """Adapter parameters of each linear. With ``gate_up_is_one``, gate and up share one A, as where
    PEFT adapts the fused weight."""
    sizes = {}
    for name, (outputs, inputs) in linears(config).items():
        # B is [outputs, rank], A is [rank, inputs].
        sizes[name] = rank * (outputs + inputs)
    if gate_up_is_one:
        # Its A [rank, hidden] is gate's already.
        sizes["up_proj"] -= rank * config["hidden_size"]
    return sizes


def adapter_parameters(config: dict[str, Any], rank: int, gate_up_is_one: bool = False) -> int:
    """Number of trained parameters, those of all experts among them."""
    sizes = adapter_sizes(config, rank, gate_up_is_one)
    return config["num_hidden_layers"] * sum_of_layer(sizes, config["num_experts"])


def flops_per_token(
    config: dict[str, Any], rank: int, num_tokens: int, gate_up_is_one: bool = False
) -> int:
    """The formula above, for sequences of ``num_tokens``."""
    layers = config["num_hidden_layers"]
    adapters = layers * met(config, adapter_sizes(config, rank, gate_up_is_one))
    scores = num_tokens * config["num_attention_heads"] * config["head_dim"] * layers
    return 4 * frozen_met(config) + 6 * adapters + 6 * scores


def layers_that_fit(config: dict[str, Any], rank: int, num_tokens: int, free_bytes: int) -> int:
    """Number of layers that train in so much memory with our kernels, by a rough count, but not
    more than the model has.

    Per layer: bfloat16 weights; adapters in bfloat16 with float32 gradient, master and two moments
    (18 bytes); activations, with 26 hidden widths for what attention, norms and residuals keep.
    Beside them: embedding and output layer, and logits three times in float32. A tenth stays free.
    """
    one = {**config, "num_hidden_layers": 1}
    h = config["hidden_size"]
    k = config["num_experts_per_tok"]
    inner = config["moe_intermediate_size"]
    weights = sum_of_layer(weight_sizes(config), config["num_experts"])
    # Elements. Each of a token's k rows keeps gate and up (2 I) and S of three projections (3 R).
    activations = num_tokens * (26 * h + k * (2 * inner + 3 * rank))
    # Bytes: 2 of each weight and activation, 2 + 4 + 4 + 8 of each adapter parameter.
    layer = 2 * weights + 18 * adapter_parameters(one, rank) + 2 * activations
    # Two matrices [V, H] in bfloat16, and three of [T, V] in float32.
    beside = 2 * 2 * config["vocab_size"] * h + 3 * 4 * num_tokens * config["vocab_size"]
    return max(0, min(config["num_hidden_layers"], int((0.9 * free_bytes - beside) // layer)))
