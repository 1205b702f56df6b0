"""Bugs in the families of models and in how they are registered. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

FAMILY = "megalora/model/families"
BASE = "megalora/model/hf_weights.py"
FIELDS_TEST = "tests/model/test_fields.py"
FAMILIES_TEST = "tests/model/test_families.py"
PEFT_TEST = "tests/distributed/test_against_peft.py gradients_of_stock_peft_in_every_family"
ROUTER, ROPE = (f"megalora/model/{name}.py" for name in ("router", "rope_fields"))
GLM = "megalora/model/families/glm4_moe.py"
MIXTRAL = "megalora/model/families/mixtral.py"
MIXTRAL_TEST = "tests/adapters/test_mixtral.py"
ROUTER_TEST = "tests/model/test_router.py"
EQUAL = "tests/verify/test_families.py test_a_family_is_equal"

FAMILY_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "Mistral's window passed over",
        f"{FAMILY}/decoder.py",
        "if window is None or window >= positions:",
        "if True:",
        f"{FIELDS_TEST} refused_by_name_and_value",
    ),
    bug(
        0,
        "Mistral's default window taken for none",
        f"{FAMILY}/mistral.py",
        "default=_DEFAULT_WINDOW",
        "default=None",
        f"{FIELDS_TEST} refused_by_name_and_value",
    ),
    bug(
        0,
        "Llama's biases of attention not in the shape",
        f"{FAMILY}/llama.py",
        "qkv_bias=bias, o_bias=bias",
        "qkv_bias=False, o_bias=False",
        f"{FIELDS_TEST} honoured_fields_are_computed",
    ),
    bug(
        0,
        "Llama's biases of the MLP passed over",
        f"{FAMILY}/llama.py",
        '"mlp_bias": or_null(only(False, because="linears of the MLP have no bias here")),',
        '"mlp_bias": or_null(flag),',
        f"{FIELDS_TEST} refused_by_name_and_value",
    ),
    bug(
        0,
        "a dense MLP's gate and up swapped in the base alone",
        BASE,
        "gate=gate, up=up)",
        "gate=up, up=gate)",
        PEFT_TEST,
    ),
    bug(
        0,
        "kinds of rotary scaling that a family was not tried with pass",
        "megalora/model/fields.py",
        "    if kind not in family.rope_kinds:\n",
        "    if kind is None:\n",
        f"{FAMILIES_TEST} a_kind_of_rotary_scaling_that_was_not_tried",
    ),
    bug(
        0,
        "extra tensors not accounted for",
        "megalora/model/account.py",
        '            needed[f"{at}.{extra.hf}"] = extra.size(shape)\n',
        "            pass\n",
        f"{FAMILIES_TEST} every_parameter_of_transformers",
    ),
    bug(
        0,
        "a norm over all heads without its sum in backward",
        "megalora/model/full_width_norm.py",
        "products_SB = _sum_over_ranks((scaled * wide).sum((-2, -1)), ctx.group)",
        "products_SB = (scaled * wide).sum((-2, -1))",
        "tests/distributed/test_full_width_norm.py values_and_gradients",
    ),
    bug(
        0,
        "a norm over the heads of one rank",
        "megalora/model/full_width_norm.py",
        "squares_SB = _sum_over_ranks(wide.square().sum((-2, -1)), group)",
        "squares_SB = wide.square().sum((-2, -1))",
        "tests/distributed/test_full_width_norm.py values_and_gradients",
    ),
    bug(
        0,
        "softmax over the chosen experts where it runs over all",
        "megalora/model/families/decoder.py",
        '{"moe_router_pre_softmax": shape.softmax_over_all}',
        '{"moe_router_pre_softmax": not shape.softmax_over_all}',
        "tests/verify/test_families.py test_a_family_is_equal",
    ),
    bug(
        0,
        "Megatron moves the correction bias towards balance",
        ROUTER,
        "self.frozen_expert_bias = True",
        "pass",
        f"{ROUTER_TEST} stay_as_stored",
        (
            "        widened = ",
            "        if self.local_tokens_per_expert is not None:\n"
            "            self.local_tokens_per_expert[0] += len(input)\n"
            "        widened = ",
        ),
    ),
    bug(
        0,
        "the correction bias rounded to the model's dtype",
        ROUTER,
        "self.frozen_expert_bias = True",
        "self.frozen_expert_bias = True\n"
        "        if self.expert_bias is not None:\n"
        "            self.expert_bias = self.expert_bias.to(self.config.params_dtype)",
        f"{ROUTER_TEST} stay_as_stored",
    ),
    bug(
        0,
        "a group of experts rated by its best expert alone",
        ROUTER,
        "BEST_OF_GROUP = 2",
        "BEST_OF_GROUP = 1",
        f"{ROUTER_TEST} corrected_sigmoids",
    ),
    bug(
        0,
        "the correction bias in the experts' weights",
        ROUTER,
        "weights_TK = scores_TE.gather(1, chosen_TK)",
        "weights_TK = (scores_TE + bias_E).gather(1, chosen_TK)",
        f"{ROUTER_TEST} corrected_sigmoids",
    ),
    bug(
        0,
        "a router that computes in the model's dtype",
        ROUTER,
        'self.config.moe_router_dtype == "fp32" and',
        "False and",
        EQUAL,
    ),
    bug(
        0,
        "one shared expert whatever their number",
        GLM,
        'shared_intermediate=hf["n_shared_experts"] * hf["moe_intermediate_size"]',
        'shared_intermediate=hf["moe_intermediate_size"]',
        EQUAL,
    ),
    bug(
        0,
        "whole heads turned where half is meant",
        ROPE,
        "share = factors[0] if factors else default",
        "share = 1.0",
        EQUAL,
    ),
    bug(
        0,
        "a family with a failing case counts as proved",
        "benchmarks/support_matrix.py",
        "if not held[False] or not all(held[False]):",
        "if not held[False]:",
        "tests/test_support_matrix.py marks",
    ),
    bug(
        0,
        "the planner's softmax over the chosen experts whatever the config says",
        f"{FAMILY}/qwen3_moe.py",
        "softmax_over_all=decoder.softmax_over_all(hf),",
        "softmax_over_all=False,",
        f"{FIELDS_TEST} honoured_fields_are_computed",
    ),
    bug(
        0,
        "what vLLM leaves out of one family is not refused",
        "megalora/adapters/write/engines.py",
        '"vllm": family.vllm.not_honoured',
        '"vllm": {}',
        "tests/adapters/test_families.py an_engine_leaves_out",
    ),
    bug(
        0,
        "a router's patterns are looked up without its weight's name",
        "megalora/adapters/read/rules.py",
        "return weight if self._targets_by_parameter([weight]) else module",
        "return module",
        "tests/adapters/test_stock_peft.py read_as_peft_computes_it",
    ),
    bug(
        0,
        "Mixtral's w1 and w3 swapped in base and adapter",
        MIXTRAL,
        '"gate_proj": "w1", "up_proj": "w3"',
        '"gate_proj": "w3", "up_proj": "w1"',
        EQUAL,
    ),
    bug(
        0,
        "Mixtral's w1 and w3 swapped in the adapter's file",
        "megalora/adapters/write/form.py",
        "                name = tensor_name(module, factor)\n",
        '                other = {"w1": "w3", "w3": "w1"}.get(module[-2:], module[-2:])\n'
        "                name = tensor_name(module[:-2] + other, factor)\n",
        "tests/adapters/test_families.py what_others_compute",
    ),
    bug(
        0,
        "patterns of an adapter's file without the names that PEFT looks up",
        "megalora/adapters/write/peft_config.py",
        'return f"({re.escape(name)}|{re.escape(other)})"',
        "return re.escape(name)",
        f"{MIXTRAL_TEST} stock_peft_reads_ranks",
    ),
    bug(
        0,
        "an adapter's file without Mixtral's names for patterns",
        "megalora/adapters/write/peft_config.py",
        'return f"({re.escape(name)}|{re.escape(other)})"',
        "return re.escape(other)",
        f"{MIXTRAL_TEST} stock_peft_reads_ranks",
    ),
    bug(
        0,
        "Mixtral's router chooses by a softmax over all experts",
        MIXTRAL,
        '"moe_router_pre_softmax": False',
        '"moe_router_pre_softmax": True',
        EQUAL,
    ),
    bug(
        0,
        "Mixtral's window passed over",
        MIXTRAL,
        "    decoder.check_window(",
        "    _ = dict(",
        f"{FIELDS_TEST} refused_by_name_and_value",
    ),
    bug(
        0,
        "packed experts take Mixtral's w3 for the first half",
        "megalora/model/projections.py",
        'first = rows if projection.role == "up_proj" else 0',
        'first = rows if projection.name == "up_proj" else 0',
        "tests/cases/test_base_cases.py names_of_transformers",
    ),
    bug(
        0,
        "names of another family's experts are read",
        "megalora/adapters/read/adapter.py",
        "if place is not None and place[0] in self.blocks:",
        "if place is not None:",
        f"{MIXTRAL_TEST} another_family_s_block",
        ("self.blocks[block], which", "int(block.split('.')[2]), which"),
    ),
    bug(
        0,
        "an incomplete expert of Mixtral's is taken for whole",
        "megalora/serve/check.py",
        "leaves = max(_EXPERT_LEAVES, key=lambda names: len(names & found))",
        "leaves = frozenset(found)",
        f"{MIXTRAL_TEST} incomplete_expert",
    ),
    bug(
        0,
        "FLOPs of adapters that are computed again go by names",
        "megalora/bench/flops.py",
        'return a.projection.kind == "expert_column"',
        'return a.name in ("gate_proj", "up_proj")',
        "tests/bench/test_measured.py whatever_linears_are_called",
    ),
)
