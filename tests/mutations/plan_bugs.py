"""Bugs in what the planner says of layers recomputed in part, and in recomputing them. The same
form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

COST_TEST = "tests/planner/test_cost.py"
BYTES_TEST = "tests/planner/test_cost_bytes.py"
KEPT_TEST = "tests/planner/test_activations.py"
PACKING_TEST = "tests/planner/test_packing.py"
ANSWERS = "tests/planner/test_answers.py"
SCENARIOS_TEST = "tests/planner/test_scenarios.py"
SEARCH = "megalora/planner/search.py"
LAYERS_TEST = "tests/planner/test_recompute_layers.py"

# fmt: off
PLAN_BUGS: tuple[Bug, ...] = (
    bug(0, "recomputed layers counted anew in every chunk", "megalora/model/recompute.py",
        "            level = level_of(recompute, position)\n",
        "            level = level_of(recompute, i)\n", f"{LAYERS_TEST} through_the_chunks"),
    bug(0, "layers planned as recomputed in every chunk", "megalora/planner/weights.py",
        "min(max(recompute.layers - self.layers_before, 0), num_layers)",
        "min(recompute.layers, num_layers)", f"{LAYERS_TEST} that_are_wrapped"),
    bug(0, "what the layers above kept still there below", "megalora/planner/pass_bytes.py",
        "        freed += kept[i]\n", "        freed += 0 * kept[i]\n", f"{LAYERS_TEST} peak"),
    bug(0, "one recomputed layer more than needed", "megalora/planner/recompute_layers.py",
        "    while enough - too_few > 1:\n", "    while enough - too_few > 2:\n",
        f"{LAYERS_TEST} fewest_layers"),
    bug(0, "keys and values of a rank's own tokens alone kept", "megalora/planner/activations.py",
        "(2 * batch.row_tokens - tokens)", "tokens", f"{KEPT_TEST} test_bytes_kept"),
    bug(0, "optimizer planned as shared over dp without cp", "megalora/planner/state_bytes.py",
        "min(count.dense, dense // layout.dp_cp)", "min(count.dense, dense // layout.dp)",
        "tests/planner/test_memory.py gradients_and_optimizer"),
    bug(0, "attention whole on every context-parallel rank", "megalora/planner/layer_cost.py",
        "attention_flops(b.samples, b.sequence, width) / self.p.cp",
        "attention_flops(b.samples, b.sequence, width)", f"{COST_TEST} share"),
    bug(0, "gradients of gathered keys and values sent to nobody",
        "megalora/planner/layer_cost.py", '"reduce_scatter" if backward else "all_gather"',
        '"all_gather"', f"{BYTES_TEST} gathered_keys"),
    bug(0, "packed documents planned as if they saw each other", "megalora/planner/microbatch.py",
        "sequence = work.packing.attended", "sequence = row", f"{PACKING_TEST} by_document"),
    bug(0, "filler counted among tokens per second", "megalora/planner/search.py",
        "work.packing.mean if work.packing else work.sample_tokens",
        "work.sequence_length", f"{PACKING_TEST} config_that_packs"),
    bug(0, "the file's layout checked without its batch", "megalora/planner/own_layout.py",
        "        config.check_world(num_ranks)\n", "", f"{ANSWERS} not_legal"),
    bug(0, "the file's layout planned at its own rank alone", "megalora/planner/own_layout.py",
        "question.lora_of_rank(lora_rank)", "question.config.lora", f"{ANSWERS} is_a_row"),
    bug(0, "the file's rows packed as if they were filled", "megalora/planner/layouts.py",
        "self.micro_batch_size if self.micro_batch_tokens is None else None", "None",
        f"{ANSWERS} as_long_as_their_samples"),
    bug(0, "GPU-hours of one GPU", "megalora/planner/layout_table.py",
        "seconds / 3600 * count.num_gpus", "seconds / 3600",
        f"{ANSWERS} are_compared"),
    bug(0, "a number of GPUs fits if everything is kept", "megalora/planner/gpu_counts.py",
        'recompute=("full",)', 'recompute=("off",)', f"{ANSWERS} whole_search"),
    bug(0, "a larger batch of as many short samples", "megalora/planner/larger_batch.py",
        "work.packing.times(times) if work.packing else None", "work.packing",
        f"{ANSWERS} larger_batch"),
    bug(0, "an H200 planned as an H20", "megalora/planner/known_gpus.py",
        "sorted(GPUS, key=len, reverse=True)", "sorted(GPUS, key=len)",
        "tests/planner/test_hardware.py found_by_its_name"),
    bug(0, "a peak with sparsity taken for a dense one", "megalora/planner/known_gpus.py",
        '"L40S 48 GB", 44, 362,', '"L40S 48 GB", 44, 733,',
        "tests/planner/test_hardware.py than_its_data_sheet"),
    bug(0, "the host as fast in every scenario", "megalora/planner/scenarios.py",
        "layer_forward_s=factor * over", "layer_forward_s=over", f"{SCENARIOS_TEST} at_a_limit"),
    bug(0, "measured rates taken for assumed ones", "megalora/planner/scenarios.py",
        'if machine.overhead.basis == "assumed":', "if machine.overhead:",
        f"{SCENARIOS_TEST} has_one_time"),
    bug(0, "surely slower in one scenario of eight", SEARCH,
        "return all(own >", "return any(own >", f"{SCENARIOS_TEST} surely"),
    bug(0, "the leanest layout chosen however slow", SEARCH,
        "            if not found.is_surely_slower(safe[0]):\n                rivals",
        "            if True:\n                rivals",
        f"{SCENARIOS_TEST} less_memory"),
    bug(0, "least memory before fewest stages", SEARCH,
        "for reason, measure, slack in rules:", "for reason, measure, slack in rules[2:]:",
        f"{SCENARIOS_TEST} of_the_rule"),
    bug(0, "what is behind waits all hidden", "megalora/planner/prices.py",
        "over.exposed * host + (1 - over.exposed) * slower", "slower",
        f"{SCENARIOS_TEST} behind_waits"),
    bug(0, "recomputation drawn as what it recomputes", "megalora/planner/figure.py",
        '    if part.startswith("recompute "):\n        return RECOMPUTATION\n',
        '    part = part.removeprefix("recompute ")\n',
        "tests/planner/test_figure.py seven_groups"),
    bug(0, "a column for the file's rows beside the others'", "megalora/planner/layout_table.py",
        'for name in ("micro", "row", "recompute"):', 'for name in ("micro", "recompute"):',
        f"{ANSWERS} column_of_the_others"),
)
# fmt: on
