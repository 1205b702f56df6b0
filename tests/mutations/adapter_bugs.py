"""Bugs in reading adapters made elsewhere. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

COPIES, RULES, WEIGHTS, BANKS, OPTIONS, ADAPTER = (
    f"megalora/adapters/read/{name}.py"
    for name in ("copies", "rules", "weights", "banks", "options", "adapter")
)
PATTERNS = "megalora/lora/patterns.py"
COPIES_TEST, STOCK, BANKS_TEST, WEIGHTS_TEST, OPTIONS_TEST = (
    f"tests/adapters/test_{name}.py"
    for name in ("copies", "stock_peft", "banks", "weights", "options")
)

TRAINED, TRAINING_STATE = (f"megalora/adapters/{name}.py" for name in ("trained", "training_state"))
STATE_TEST = "tests/adapters/test_training_state.py"

# fmt: off
ADAPTER_BUGS: tuple[Bug, ...] = (
    bug(0, "a checkpoint's padding guessed", TRAINED, "if is_checkpoint else", "if False else",
        f"{STATE_TEST} rank_of_zeros"),
    bug(0, "a checkpoint's changed file exported", TRAINED,
        "if not torch.equal(tensor, adapter.tensors[name]):", "if False:",
        f"{STATE_TEST} contradict"),
    bug(0, "a checkpoint's changed alpha exported", TRAINED,
        "if apart := differing(settings([w for w, _ in pairs]), settings(adapter.adapted)):",
        "if apart := differing(settings(adapted), settings(adapted)):",
        f"{STATE_TEST} contradict"),
    bug(0, "masters exported in float32", TRAINING_STATE, "value.to(dtypes[name])", "value",
        f"{STATE_TEST} checkpoint_is_its_file"),
    bug(0, "rows of a checkpoint not saved", "megalora/train/checkpoint/save.py",
        '"adapted": settings(model.adapted),', '"adapted": [],', f"{STATE_TEST} what_training"),
    bug(0, "a trained embedding passed over", COPIES, "return None if possible else largest",
        "return None", f"{COPIES_TEST} trained_embedding"),
    bug(0, "a copy in another dtype taken for a trained weight", COPIES,
        '(own, "F32", "BF16", "F16")', '(own, "F32")', f"{COPIES_TEST} dtype_that_the_base"),
    bug(0, "bfloat16 cut instead of rounded", COPIES, "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "bits >> 16", f"{COPIES_TEST} rounding_is_torch"),
    bug(0, "a resized vocabulary passed over", COPIES, "    if info.shape != size:",
        "    if False:", f"{COPIES_TEST} resized_vocabulary"),
    bug(0, "a server's adapter with another head", "megalora/serve/check.py",
        "        _check_copies(files, shape, limits.base)\n", "", f"{COPIES_TEST} server_s_check"),
    bug(0, "exclusions not subtracted", RULES, "if ends_in(module, self.excluded) or (", "if (",
        "tests/cases/test_adapter_cases.py excluded_targets"),
    bug(0, "parameters excluded like modules", RULES, "            return found\n        leaf",
        "            return set()\n        leaf", f"{STOCK} read_as_peft"),
    bug(0, "layers forgotten", RULES, "        elif self._in_layers(module):", "        else:",
        f"{STOCK} read_as_peft"),
    bug(0, "layers that hold for full names", RULES, "        if module in self.modules:",
        "        if False:", f"{STOCK} read_as_peft"),
    bug(0, "two alphas for a module not said", RULES, "            if value != holds:",
        "            if False:", f"{STOCK} keys_that_peft_sorts"),
    bug(0, "a shard lost without a word", WEIGHTS, "for name in expected if name not in names]",
        "for name in expected if False]", "tests/adapters/test_weight_shards.py broken_shards"),
    bug(0, "an index of shards not read", WEIGHTS, "    if len(files) == 1 or not path.is_file():",
        "    if True:", "tests/adapters/test_weight_shards.py broken_shards"),
    bug(0, "a pickle that runs code", WEIGHTS, "weights_only=True, mmap=True)",
        "weights_only=False, mmap=True)", "tests/adapters/test_pickles.py runs_no_code",
        ('content = torch.load(path, map_location="cpu", weights_only=True)',
         'content = torch.load(path, map_location="cpu", weights_only=False)')),
    bug(0, "bfloat16 read as half of its value", WEIGHTS, "raw.astype(np.uint32) << 16",
        "raw.astype(np.uint32) << 15", f"{WEIGHTS_TEST} rows_are_the_tensor"),
    bug(0, "Tinker's gate and up swapped", BANKS, '"w1": "gate_proj", "w2": DOWN, "w3": "up_proj"',
        '"w1": "up_proj", "w2": DOWN, "w3": "gate_proj"', f"{BANKS_TEST} 3d_tensors"),
    bug(0, "up's rows before gate's", BANKS, "zip(HALVES, b.chunk(2)",
        "zip(HALVES[::-1], b.chunk(2)", f"{BANKS_TEST} gate_and_up"),
    bug(0, "Tinker's head not in its all-linear", ADAPTER,
        "also=[TINKER_HEAD] if TINKER_HEAD in name else []", "also=[]",
    f"{BANKS_TEST} tinker_s_head"),
    bug(0, "an unknown option of an adapter passes", OPTIONS, "        if config[key]:\n",
        "        if False:\n", f"{OPTIONS_TEST} set_and_not_plain"),
    bug(0, "a server that ignores rsLoRA not named", OPTIONS,
        'elsewhere={"sglang": "scales by alpha / r"}', "elsewhere={}",
        "tests/adapters/test_inspect.py does_not_follow"),
    bug(0, "an alpha of 400 digits", OPTIONS, "0 < value <= LARGEST and math.isfinite(value)",
        "0 < value and math.isfinite(value)", f"{OPTIONS_TEST} mean_nothing"),
    bug(0, "a name that ends in the middle of a word", PATTERNS,
        r'rf"(.*\.)?({expression or entry})$"', r'rf".*({expression or entry})$"',
        "tests/lora/test_select.py test_refused"),
    bug(0, "an expression of the lora section that hangs", PATTERNS,
        "            self.spent_s = TOTAL_SECONDS\n", "            pass\n",
        "tests/lora/test_select.py test_refused"),
    bug(0, "braces that match fuzzily", PATTERNS, '_LONE_BRACE.sub(r"\\\\{", expression)',
        'expression', "tests/lora/test_patterns.py as_python"),
    bug(0, "experts scaled up by a smaller rank", "megalora/lora/select.py",
        "return rank, scale / lora_scale(1.0, rank, lora.use_rslora)",
        "return rank, float(lora.alpha)", "tests/lora/test_select.py expert_rank_by_a_rule"),
    bug(0, "a rank of experts rounded down", "megalora/lora/select.py",
        "    if lora.rank % parts:\n", "    if False:\n",
        "tests/lora/test_select.py expert_rank_that_leaves"),
    bug(0, "a warning of PEFT's without an explanation", "megalora/adapters/write/engines.py",
        '    "Found missing adapter keys while loading the checkpoint",\n', "",
        "tests/adapters/test_peft_warnings.py documentation"),
    bug(0, "the card quotes a warning that PEFT does not give", "megalora/adapters/write/card.py",
        "did not match any targeted", "matched no targeted",
        "tests/adapters/test_peft_warnings.py documentation"),
    bug(0, "a push that names a base nobody else has", "megalora/adapters/push.py",
        "if is_on_this_machine(name):", "if False:", "tests/test_early_refusals.py before_torch"),
    bug(0, "what was meant to be private pushed to a public repository",
        "megalora/adapters/push.py", "if private and not found.private:", "if False:",
        "tests/adapters/test_push.py push_uploads"),
)
