"""Bugs in adapters that begin as a part of the base, and in biases of B: factors, signs, files, the
model without them. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

BASE_FACTORS = "megalora/lora/base_factors.py"
FACTORS = "megalora/lora/factors.py"
TRAINED = "tests/train/test_begun_from_base.py"
GRID = "tests/parity/test_grid.py begun"

BIASES = "tests/distributed/test_against_peft.py bias"
BIAS_FILES = "tests/adapters/test_lora_bias.py"

BEGUN_BUGS: tuple[Bug, ...] = (
    bug(0, "the frozen pair added, not taken away, on dense linears", FACTORS,
        "-self._block_matrix(self.lora_B0)", "self._block_matrix(self.lora_B0)", GRID),
    bug(0, "the frozen pair added, not taken away, on experts", FACTORS,
        "[b, -self.lora_B0[name]]", "[b, self.lora_B0[name]]", GRID),
    bug(0, "the frozen pair of a router left out", "megalora/lora/router.py",
        "h = torch.cat([h, F.linear(x, self.factors.lora_A0)], dim=-1)",
        "h = torch.cat([h, 0 * F.linear(x, self.factors.lora_A0)], dim=-1)", GRID),
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
        '[own["B"], -own["B0"].to(own["B"].dtype)]', '[own["B"], 0 * own["B0"].to(own["B"].dtype)]',
        f"{TRAINED} published_base"),
    bug(0, "a file with the scale of twice the rank", "megalora/adapters/as_plain.py",
        "alpha=a.scale * rank", "alpha=a.alpha, scale=a.scale / 2", f"{TRAINED} published_base"),
    bug(0, "a frozen pair that a resumed run lacks", "megalora/train/checkpoint/load.py",
        "        read_tensors(state.folder / OPTIMIZER, model.frozen,",
        "        read_tensors(state.folder / OPTIMIZER, [],", f"{TRAINED} goes_on"),
    bug(0, "a start that may change in the middle of a run",
        "megalora/train/checkpoint/same_run.py", '"lora.init": "lora",', "",
        f"{TRAINED} another_start"),
    bug(0, "a frozen pair beside experts with dropout", "megalora/lora/factor_checks.py",
        "if a.projection.is_expert and lora.dropout:", "if False:", f"{TRAINED} named"),
    bug(0, "lm_head begun as a part of itself", "megalora/lora/factor_checks.py",
        "if a.projection in HEAD:", "if False:", f"{TRAINED} named"),
    bug(0, "a frozen pair that is not planned", "megalora/planner/state_bytes.py",
        "if not FACTORS[factor].trained:", "if False:",
        "tests/planner/test_dryrun.py lora"),
    bug(0, "a bias of B without the scale", FACTORS, "(self.lora_C[name] * scales[name])",
        "self.lora_C[name]", BIASES),
    bug(0, "biases of B in the rows of another projection", FACTORS,
        "return torch.cat(blocks, dim=-1).flatten()\n\n    def stacked_b",
        "return torch.cat(blocks, dim=-1).flatten().flip(0)\n\n    def stacked_b", BIASES),
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
        "if not has_base_bias(a.projection, shape):", "if False:", f"{BIAS_FILES} beside"),
)  # fmt: skip
