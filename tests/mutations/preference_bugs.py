"""Bugs in learning from pairs of answers: data, reference pass, losses. The same form as
``bugs.py``."""

from tests.mutations.bugs import Bug, bug

LOSS, CHOOSE = (f"megalora/objectives/{name}.py" for name in ("preference", "choose"))
OBJECTIVE = "megalora/objectives/objective.py"
PAIRS = "megalora/data/pairs.py"
STEP = "megalora/train/step.py"
OFF = "megalora/lora/switched_off.py"
OF_LOSS = "tests/objectives/test_preference.py"
OF_CONFIG = "tests/objectives/test_choose.py"
OF_DATA = "tests/data/test_pairs.py"
OF_OFF = "tests/lora/test_switched_off.py"
GRID = "tests/parity/test_grid.py dpo"

PREFERENCE_BUGS: tuple[Bug, ...] = (
    # losses
    bug(
        0,
        "chosen and rejected swapped",
        LOSS,
        "Pairs(sums[::2], sums[1::2], ratios[::2], ratios[1::2]",
        "Pairs(sums[::2], sums[1::2], ratios[1::2], ratios[::2]",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "pairs divided by those of their row",
        LOSS,
        '.sum() / divisors["pairs"]',
        ".mean()",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "chosen tokens divided by the rejected ones too",
        LOSS,
        "tokens += sum(targets[::2])",
        "tokens += sum(targets)",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "IPO of whole sums",
        LOSS,
        "chosen = pairs.chosen_ratio / pairs.chosen_targets\n    rejected = pairs.rejected_ratio",
        "chosen = pairs.chosen_ratio\n    rejected = pairs.rejected_ratio",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "robust without its divisor",
        LOSS,
        "return unbiased / (1 - 2 * smoothing)",
        "return unbiased",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "smoothing that takes away and does not add",
        LOSS,
        "return (1 - smoothing) * right - smoothing * F.logsigmoid(-difference)",
        "return (1 - smoothing) * right",
        f"{OF_LOSS} mixture",
    ),
    bug(
        0,
        "a margin times beta",
        LOSS,
        "(chosen - rejected) - options.margin",
        "(chosen - rejected - options.margin)",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "odds without their complement",
        LOSS,
        "return mean - torch.log(-torch.expm1(mean))",
        "return mean",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "a sequence's gradient counted once per context-parallel rank",
        "megalora/comm.py",
        "lambda gradient, group: gradient",
        "_all_reduce",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "a reported number counted once per context-parallel rank",
        OBJECTIVE,
        "return value if self.cp.rank() == 0 else torch.zeros_like(value)",
        "return value",
        f"{OF_LOSS} what_is_reported",
    ),
    bug(
        0,
        "a reward without the reference taken off",
        LOSS,
        "chosen = self.beta * pairs.chosen_ratio\n",
        "chosen = self.beta * pairs.chosen\n",
        f"{OF_LOSS} what_is_reported",
    ),
    bug(
        0,
        "ORPO without its cross entropy",
        CHOOSE,
        'sft_weight = 1.0 if options.name == "orpo" else 0.0',
        "sft_weight = 0.0",
        f"{OF_CONFIG} defaults",
    ),
    # the reference
    bug(
        0,
        "a reference with the adapters on",
        STEP,
        "with adapters_off(self.chunks):",
        "if True:",
        GRID,
    ),
    bug(0, "the reference of another microbatch", STEP, "rows[batch.number]", "rows[0]", GRID),
    bug(
        0,
        "a reference that counts experts' tokens",
        STEP,
        "        self.load.active = False\n",
        "",
        "tests/train/test_preference.py tokens_of_experts",
    ),
    bug(
        0,
        "adapters that stay switched off",
        OFF,
        "parameter.data = values",
        "pass",
        f"{OF_OFF} base",
    ),
    # the planner
    bug(
        0,
        "a plan without the reference",
        "megalora/config/objective.py",
        'return int(self.name == "dpo")',
        "return 0",
        "tests/planner/test_plan.py reference",
    ),
    bug(
        0,
        "a reference with the head's gradient",
        "megalora/planner/cost.py",
        "found.take(self.head_without_gradient())",
        "found.take(self.head()[0])",
        "tests/planner/test_cost.py reference",
    ),
    bug(
        0,
        "a pair planned as one long sequence",
        "megalora/planner/workload.py",
        "return self.sequences * self.sequence_length",
        "return self.sequence_length",
        "tests/planner/test_cost.py two_sequences",
    ),
    # what is said of it
    bug(
        0,
        "evaluations of the loss alone in a report",
        "megalora/report/page.py",
        'evaluated = f"eval_{quantity}"',
        'evaluated = "eval_loss" if quantity == "loss" else ""',
        "tests/report/test_page.py every_quantity",
    ),
    bug(
        0,
        "a card that calls pairs samples",
        "megalora/adapters/write/card.py",
        'samples = "samples" if objective["name"] == "sft" else "pairs"',
        'samples = "samples"',
        "tests/adapters/test_export.py card_of_preferences",
    ),
    # data
    bug(
        0,
        "answers that begin alike taken for the prompt",
        PAIRS,
        "    if chosen.num_context:\n        common = chosen.num_context\n",
        "",
        f"{OF_DATA} what_is_common",
    ),
    bug(
        0,
        "a common answer in the loss",
        PAIRS,
        "replace(rejected, num_context=common)",
        "replace(rejected, num_context=0)",
        f"{OF_DATA} trl_s",
    ),
    bug(
        0,
        "a limit for both sequences together",
        "megalora/data/too_long.py",
        "is_long = store.longest > max_length",
        "is_long = store.lengths > max_length",
        f"{OF_DATA} limit",
    ),
    bug(
        0,
        "one sequence of two in a row",
        "megalora/data/batch.py",
        "sequences += sample.sequences",
        "sequences.append((sample.input_ids, sample.loss_mask))",
        f"{OF_DATA} two_sequences",
    ),
    bug(
        0,
        "a row longer than its pairs",
        "megalora/data/splits.py",
        "(2 if self.pairs else 1)",
        "1",
        f"{OF_DATA} two_sequences",
    ),
    bug(
        0,
        "pairs of which one has nothing to learn",
        PAIRS,
        "if is_same or not all(mask.any() for mask in masks):",
        "if False:",
        f"{OF_DATA} nothing_to_learn",
    ),
    bug(
        0,
        "pairs from a store of conversations",
        "megalora/data/token_cache.py",
        '        "pairs": recipe.pairs,\n',
        "",
        f"{OF_DATA} stored_apart",
    ),
    bug(
        0,
        "target tokens of a sequence on this rank alone",
        "megalora/train/inputs.py",
        "pieces.append(torch.tensor(batch.targets))",
        "pieces.append(torch.bincount(pieces[-1], minlength=batch.num_sequences))",
        "tests/train/test_inputs.py sequences",
    ),
)
