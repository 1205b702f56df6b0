"""Bugs in adapters that are initialised from the base weights, and in biases of B: files, factors,
the model without them. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

BASE_FACTORS = "megalora/lora/base_factors.py"
FACTORS = "megalora/lora/factors.py"
TRAINED = "tests/train/test_begun_from_base.py"
GRID = "tests/parity/test_grid.py begun"

BIASES = "tests/distributed/test_against_peft.py bias"
BIAS_FILES = "tests/adapters/test_lora_bias.py"
BFLOAT16 = "tests/train/test_begun_bfloat16.py"

BEGUN_BUGS: tuple[Bug, ...] = (
    bug(0, "what A has learned taken away, on dense linears", FACTORS,
        "self._block_matrix(self.lora_B0)], -1)", "-self._block_matrix(self.lora_B0)], -1)", GRID),
    bug(0, "what A has learned taken away, on experts", FACTORS,
        "beside = self.lora_B0[adapted.name]", "beside = -self.lora_B0[adapted.name]", GRID),
    bug(0, "what B has learned beside A0 alone, on dense linears", FACTORS,
        "whole = F.linear(dropped, self.lora_A0) + h", "whole = F.linear(dropped, self.lora_A0)",
        GRID),
    bug(0, "what B has learned beside A0 alone, on experts", FACTORS,
        "[self.lora_A0[:, rows] + own_a, own_a]", "[self.lora_A0[:, rows], own_a]", GRID),
    bug(0, "A itself rounded to bfloat16, on dense linears", FACTORS,
        "        whole = F.linear(dropped, self.lora_A0) + h\n",
        "        rounded = (self.lora_A0 + self.lora_A) - self.lora_A0\n"
        "        h = F.linear(dropped, rounded)\n"
        "        whole = F.linear(dropped, self.lora_A0) + h\n", f"{BFLOAT16} rounds"),
    bug(0, "A itself rounded to bfloat16, on experts", FACTORS,
        "own_a = self.lora_A[:, rows]\n",
        "own_a = self.lora_A[:, rows]\n"
        "            if self.lora_A0 is not None:\n"
        "                own_a = (self.lora_A0[:, rows] + own_a) - self.lora_A0[:, rows]\n",
        f"{BFLOAT16} rounds"),
    bug(0, "A itself rounded to bfloat16, in a file", "megalora/adapters/as_plain.py",
        "[start_a + own, own]", "[start_a + own, (start_a + own) - start_a]",
        f"{BFLOAT16} files"),
    bug(0, "dropout before A0 as before A", FACTORS, "        if dropout:\n", "        if False:\n",
        f"{BFLOAT16} rounds"),
    bug(0, "decay of differences", "megalora/config/run.py",
        "            not self.train.weight_decay,\n", "            True,\n",
        f"{TRAINED} beside_it"),
    bug(0, "an import taken for a start from the base", "megalora/train/checkpoint/same_run.py",
        "    if has_start(adapted):\n", "    if False:\n",
        "tests/distributed/test_import.py start_from_the_base"),
    bug(0, "A0 that is trained", "megalora/lora/spec.py", '"A0": Factor("A", trained=False)',
        '"A0": Factor("A")', f"{TRAINED} stock_peft"),
    bug(0, "key heads that ranks share gathered twice", BASE_FACTORS,
        'num_shards = linear.adapted.num_shards("B", group.size())',
        "num_shards = group.size()", f"{TRAINED} every_linear"),
    bug(0, "factors of the expert before", BASE_FACTORS,
        "place = lead[0] if lead else None", "place = lead[0] - 1 if lead else None",
        f"{TRAINED} every_linear"),
    bug(0, "factors of the whole scale", BASE_FACTORS, "(s_K[:rank] / scale).sqrt()",
        "s_K[:rank].sqrt()", f"{TRAINED} definition"),
    bug(0, "signs as they come", BASE_FACTORS,
        "(s_K[:rank] / scale).sqrt() * sign_R", "(s_K[:rank] / scale).sqrt()",
        f"{TRAINED} definition"),
    bug(0, "one iteration however many are asked for", BASE_FACTORS, "in range(iterations):",
        "in range(1):", f"{TRAINED} definition"),
    bug(0, "replicas that factorise for themselves", BASE_FACTORS,
        "        sum_bucket(pairs, replicas)\n", "", f"{TRAINED} stock_peft"),
    bug(0, "the frozen pair on where adapters are off", "megalora/lora/switched_off.py",
        "(module.lora_B, module.lora_B0, module.lora_C)", "(module.lora_B, module.lora_C)",
        "tests/lora/test_switched_off.py began_as"),
    bug(0, "a file without what the adapter began as", "megalora/adapters/as_plain.py",
        "[own, start_b]", "[own, 0 * start_b]",
        f"{TRAINED} published_base"),
    bug(0, "a file with the scale of twice the rank", "megalora/adapters/as_plain.py",
        "alpha=a.scale * rank", "alpha=a.alpha, scale=a.scale / 2", f"{TRAINED} published_base"),
    bug(0, "a frozen pair that a resumed run lacks", "megalora/train/checkpoint/load.py",
        "read_shards(saved, STATE_KEYS[0], model.shards,",
        "read_shards(saved, STATE_KEYS[0], model.trained,", f"{TRAINED} goes_on"),
    bug(0, "a start that may change in the middle of a run",
        "megalora/train/checkpoint/same_run.py", '"lora.init": "lora",', "",
        f"{TRAINED} another_start"),
    bug(0, "a frozen pair beside experts with dropout", "megalora/lora/factor_checks.py",
        "if a.projection.is_expert and lora.dropout:", "if False:", f"{TRAINED} named"),
    bug(0, "lm_head begun as a part of itself", "megalora/lora/factor_checks.py",
        "if a.projection in HEAD:", "if False:", f"{TRAINED} named"),
    bug(0, "a reference at the start without the frozen pair", "megalora/train/checkpoint/start.py",
        "    # A fresh run and an imported adapter begin here;",
        "    for shard in model.frozen:\n"
        "        start[shard.parameter] = torch.zeros_like(shard.parameter)\n"
        "    # A fresh run and an imported adapter begin here;",
        "tests/train/test_begun_reference.py float64"),
    bug(0, "a frozen pair that is not planned", "megalora/planner/state_bytes.py",
        "lambda a, factor: not FACTORS[factor].trained", "lambda a, factor: False",
        "tests/planner/test_dryrun.py lora"),
    bug(0, "a bias of B without the scale", FACTORS,
        "{name: c * scales[name] for", "{name: c for", BIASES),
    bug(0, "biases of B in the rows of another projection", FACTORS,
        "return self.fused.stacked(biases, self.lora_A)",
        "return self.fused.stacked(biases, self.lora_A).flip(0)", BIASES),
    bug(0, "biases of B on where adapters are off", "megalora/lora/switched_off.py",
        "(module.lora_B, module.lora_B0, module.lora_C)", "(module.lora_B, module.lora_B0)",
        "tests/lora/test_switched_off.py biases_of_b"),
    bug(0, "a bias of B merged without the scale", "megalora/adapters/merge.py",
        "bias_O + block.scale * factors", "bias_O + factors", f"{BIAS_FILES} merging"),
    bug(0, "lora_bias left out of the file", "megalora/adapters/write/form.py",
        "if has_biases(written):", "if False:",
        f"{BIAS_FILES} export"),
    bug(0, "vLLM given biases of B", "megalora/adapters/write/engines.py",
        'name != "peft" and has_biases(adapted)', "False", f"{BIAS_FILES} export"),
    bug(0, "biases of B where the base has none", "megalora/lora/factor_checks.py",
        "if not has_bias(a.projection, shape):", "if False:", f"{BIAS_FILES} beside"),
)  # fmt: skip
