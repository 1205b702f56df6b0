"""Bugs in DoRA: the magnitude's place in the table of factors, norms, scaling, files. The same form
as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

SPEC = "megalora/lora/spec.py"
MAGNITUDE = "megalora/lora/magnitude.py"
DENSE = "megalora/lora/dense.py"
MERGE = "megalora/adapters/merge.py"
TABLE = "tests/lora/test_factors.py"
NORMS = "tests/lora/test_magnitude.py"
FILES = "tests/adapters/test_dora.py"
GRID = "tests/parity/test_grid.py dora"
TRAINED = "tests/train/test_dora.py"

DORA_BUGS: tuple[Bug, ...] = (
    bug(0, "a magnitude that is split like A", SPEC, '"M": Factor("B",', '"M": Factor("A",', TABLE),
    bug(0, "a magnitude in bfloat16", SPEC, "float32=True, decays", "decays", TABLE),
    bug(0, "magnitudes that are not counted", SPEC, "if FACTORS[factor].trained:",
        "if not FACTORS[factor].is_vector:", f"{TABLE} counted"),
    # Marked as whole on every rank: other rows of it would be added to a rank's own.
    bug(0, "magnitudes of column layers summed over TP", "megalora/lora/shards.py",
        "num_shards = adapted.num_shards(factor, group.size())",
        'num_shards = 1 if factor == "M" else adapted.num_shards(factor, group.size())', GRID),
    bug(0, "norms of row layers of one rank's columns", MAGNITUDE,
        "if factors.sharding.split_a is not None:", "if False:", GRID),
    bug(0, "norms that stay those of the start", "megalora/train/assemble.py",
        "if self.config.lora.use_dora:", "if False:", GRID),
    bug(0, "norms of before after a resume", "megalora/train/checkpoint/load.py",
        "    refresh_norms(model.chunks, model.groups)\n", "", f"{TRAINED} goes_on"),
    bug(0, "norms without the product of W and B A", MAGNITUDE, "(2 * wa_OR + b_OR @ gram_RR)",
        "(b_OR @ gram_RR)", f"{NORMS} definition"),
    bug(0, "norms in the rows of another projection", MAGNITUDE,
        "squares_O.clamp_min(tiny).sqrt()", "squares_O.clamp_min(tiny).sqrt().flip(0)",
        f"{NORMS} definition"),
    bug(0, "a scaling rounded to bfloat16 first", MAGNITUDE, "torch.mul(u, g_O, out",
        "torch.mul(u, g_O.to(u.dtype), out", f"{NORMS} cannot_hold"),
    bug(0, "dm without the norm", MAGNITUDE, "(m / factors.norms[name])",
        "(m / factors.norms[name].mean())", f"{NORMS} gradients"),
    bug(0, "a bias scaled with the weight", DENSE, "            base.skip_bias_add = True\n", "",
        "tests/distributed/test_against_peft.py dora"),
    bug(0, "magnitudes on where adapters are off", "megalora/lora/switched_off.py",
        "values[magnitude] = module.norms[name]", "values[magnitude] = magnitude.data",
        "tests/lora/test_switched_off.py magnitudes"),
    bug(0, "DoRA merged as LoRA", MERGE, "if m_O is not None:", "if False:", f"{FILES} merging"),
    bug(0, "a block merged with the first rows' magnitudes", MERGE, "m_O[number * at_once :]",
        "m_O[0:]", f"{FILES} small_blocks"),
    bug(0, "use_dora left out of the file", "megalora/adapters/write/form.py",
        "use_dora=has_dora", "use_dora=False", f"{FILES} export"),
    bug(0, "vLLM given DoRA", "megalora/adapters/write/engines.py",
        'name != "peft" and has_magnitudes(adapted)', "False", f"{FILES} servers"),
    bug(0, "DoRA beside dropout", "megalora/config/lora.py",
        "not (self.use_dora and self.dropout)", "True", f"{NORMS} dropout"),
    bug(0, "DoRA that is left out on experts", "megalora/lora/select.py",
        "if not has_dora(a.projection):", "if False:", f"{NORMS} refused"),
    bug(0, "DoRA resumed as plain LoRA", "megalora/train/checkpoint/same_run.py",
        '"lora.use_dora": False,', "", "tests/evaluate/test_variants.py base_of_dora"),
    bug(0, "a DoRA layer's output not planned", "megalora/planner/magnitudes.py",
        "return rows * features * e + kept", "return kept",
        "tests/planner/test_activations.py tiny_dense"),
)  # fmt: skip
