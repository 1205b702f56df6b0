"""Make a mixture of experts out of a dense model: every expert is a copy of the dense MLP.

    dense      y = f(x)                                 f(x) = down(silu(gate x) * (up x))
    upcycled   y = sum over the chosen experts e of p_e f_e(x)

Mixtral's router takes the softmax over the chosen experts alone, so their p_e sum to 1. As all f_e
are f at first, y = f(x) whichever experts a router chooses: the two models are one function until
adapters make the experts differ.
"""

import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Fields of the config that mean the same in Llama and in Mixtral."""
ROUTER_STD = 0.02
"""Standard deviation of the router's weights, as transformers initialises a Mixtral."""


def upcycle(
    dense: LlamaForCausalLM, *, num_experts: int = 4, top_k: int = 2, seed: int = 0
) -> MixtralForCausalLM:
    """A Mixtral that computes what ``dense`` computes, in its dtype, with copies of its weights.

    Args:
        dense: a model without biases.
        num_experts, top_k: experts of a layer, and how many of them a token goes to.
        seed: decides the router, which is random so that tokens spread over the experts. A router
            of zeros would send every token to the same two, and the others would never train.
    Raises:
        ValueError: the dense model has a weight that a Mixtral has no place for, such as a bias.
    """
    fields = {name: getattr(dense.config, name) for name in SHARED_FIELDS}
    config = MixtralConfig(
        **fields, num_local_experts=num_experts, num_experts_per_tok=top_k, sliding_window=None
    )
    # Values that transformers draws here are all replaced, and the caller's generator is kept.
    with torch.random.fork_rng(devices=[]):
        model = MixtralForCausalLM._from_config(config, dtype=dense.dtype)

    weights = dict(dense.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate = weights.pop(f"{mlp}.gate_proj.weight")
        up = weights.pop(f"{mlp}.up_proj.weight")
        down = weights.pop(f"{mlp}.down_proj.weight")
        # [E, 2 I, H] and [E, H, I]: transformers keeps gate above up in one matrix.
        weights[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up]).repeat(num_experts, 1, 1)
        weights[f"{mlp}.experts.down_proj"] = down.repeat(num_experts, 1, 1)
        router = torch.randn(num_experts, config.hidden_size, generator=generator)
        weights[f"{mlp}.gate.weight"] = (ROUTER_STD * router).to(dense.dtype)

    # Strict: a name that is left over or missing is an error.
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"this model cannot be upcycled: {error}") from None
    return model.eval()
