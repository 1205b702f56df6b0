"""Bugs in the model that the layer check before step 1 must see, and bugs in the check. The same
form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

BACKEND = "megalora/model/backend.py"
ATTENTION = "megalora/model/attention.py"
BASE = "megalora/model/hf_weights.py"
LAYER, COMPARE, LOADED, RECORDS, REFERENCE = (
    f"megalora/verify/{name}.py"
    for name in ("layer", "compare_layer", "loaded", "records", "reference")
)
TEST = "tests/verify/test_layer.py"
COSTS_TEST = "tests/verify/test_layer_costs.py"

FORMATS = "tests/lora/test_expert_formats.py"

# fmt: off
LAYER_BUGS: tuple[Bug, ...] = (
    # how experts' weights lie in memory
    bug(0, "a weight loaded beside its buffer", "megalora/model/experts.py",
        "nn.Parameter(matrix, requires_grad=False)",
        "nn.Parameter(matrix.clone(), requires_grad=False)", f"{FORMATS} weights_lie"),
    bug(0, "another layer's format", BACKEND, "formats.get(layer, BOTH_PLAIN)",
        "formats.get(layer + 1, BOTH_PLAIN)", f"{FORMATS} weights_lie"),
    bug(0, "room for one of gate and up", "megalora/lora/experts.py",
        'rpartition(".")[2]] += a.product_rank', 'rpartition(".")[2]] = a.product_rank',
        f"{FORMATS} weights_lie"),
    bug(0, "too little room overlooked", "megalora/model/experts.py",
        "if 0 < room < rank:", "if False:", f"{FORMATS} larger"),
    # in the model
    bug(0, "a norm with another epsilon", BACKEND, "self.weight, self.eps)", "self.weight, 1e-5)",
        f"{TEST} families"),
    bug(0, "no norms on queries and keys", BACKEND,
        "if config.qk_layernorm:", "if False:", f"{TEST} families"),
    bug(0, "softmax by the head's size", "megalora/model/rotary.py",
        "factor**2 / math.sqrt(head_dim)", "factor**2 / head_dim", f"{TEST} families"),
    bug(0, "an attention factor applied once", "megalora/model/rotary.py",
        "factor**2 / math.sqrt(head_dim)", "factor / math.sqrt(head_dim)", f"{TEST} honoured"),
    bug(0, "attention that sees what comes later", ATTENTION, "is_causal=True", "is_causal=False",
        f"{TEST} families"),
    bug(0, "GELU in the experts", "kernels/megalora_kernels/swiglu.py", "torch.mul(F.silu(gate_MI)",
        "torch.mul(F.gelu(gate_MI)", f"{TEST} families"),
    bug(0, "the base's up rows before its gate rows", BASE, 'halves = ("gate_proj", "up_proj")',
        'halves = ("up_proj", "gate_proj")', f"{TEST} families"),
    bug(0, "key heads repeated round and round", BASE,
        "heads.repeat_interleave(config.num_query_groups // heads.shape[0], 0)",
        "torch.cat([heads] * (config.num_query_groups // heads.shape[0]))", f"{TEST} every_layout"),
    bug(0, "another rank's experts", BASE,
        "range(self.ep_rank * count, (self.ep_rank + 1) * count)",
        "range((1 - self.ep_rank) * count, (2 - self.ep_rank) * count)", f"{TEST} every_layout"),
    bug(0, "a shared expert without its gate", "megalora/model/families/qwen2_moe.py",
        'settings["moe_shared_expert_gate"] = True',
        'settings["moe_shared_expert_gate"] = False', f"{TEST} families"),
    bug(0, "a router without softmax over all experts", "megalora/model/build.py",
        'moe_router_load_balancing_type="none"',
        'moe_router_load_balancing_type="none", moe_router_pre_softmax=False', f"{TEST} families"),
    # in the check
    bug(0, "a tolerance that lets mistakes pass", RECORDS, "TOLERANCE = 1e-4", "TOLERANCE = 0.5",
        f"{TEST} named_with_its_module"),
    bug(0, "the ends compared by their tables alone", COMPARE, "        logits = logits_TV[:, ",
        "        logits = self.reference.model.get_output_embeddings()(hidden)[:, ",
    f"{TEST} does_around_its_layers"),
    bug(0, "a difference measured over all tokens", RECORDS, "theirs.abs().amax(1).clamp_min",
        "theirs.abs().amax().clamp_min", f"{COSTS_TEST} agreement"),
    bug(0, "gates that are not driven", RECORDS, "2.0 ** (4 * torch", "2.0 ** (0 * torch",
        f"{COSTS_TEST} only_experts"),
    bug(0, "tokens all of one size", RECORDS, "10.0 ** (-5 + 6 * (7", "10.0 ** (0 * (7",
        f"{TEST} named_with_its_module"),
    bug(0, "angles compared without their rounding", RECORDS, "2.0**-21 * angles_TD.abs())",
        "0 * angles_TD.abs())", f"{COSTS_TEST} rotary_table"),
    bug(0, "fused rows joined rank by rank", LOADED,
        "        for block in range(place.blocks):\n            for part in parts:\n",
        "        for part in parts:\n            for block in range(place.blocks):\n",
        f"{TEST} every_layout"),
    bug(0, "adapters gathered as if they were the base", LOADED,
        'is_trained = ".lora_" in full or ".trained_biases." in full',
        'is_trained = ".lora_A" in full', f"{TEST} moved"),
    bug(0, "jumps of positions taken for new documents", REFERENCE, "attention_mask=ones, ", "",
        f"{TEST} families"),
    bug(0, "all experts gathered for a few tokens", COMPARE, "needed.nonzero().flatten().tolist()",
        "list(range(len(needed)))", f"{COSTS_TEST} only_experts"),
    bug(0, "one layer for all kinds", COMPARE,
        "return tuple(settings), shapes, self._attention(number)", "return 0",
        f"{TEST} every_layout"),
    bug(0, "the check draws from the run's generators", LAYER,
        "return work()", "torch.rand(1)\n                return work()",
        f"{COSTS_TEST} to_the_bit"),
)
# fmt: on
