"""Bugs in biases of the base that are trained (``lora.bias``). The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

BIASES = "megalora/lora/biases.py"
WEIGHT = "megalora/lora/trained_weight.py"
FUSED = "megalora/lora/fused_rows.py"
WHOLE = "megalora/lora/whole.py"
READ = "megalora/adapters/read/whole.py"
PEFT = "tests/distributed/test_against_peft.py"
FILES = "tests/adapters/test_bias.py"

BIAS_BUGS: tuple[Bug, ...] = (
    bug(0, "a bias added to the base's own", BIASES,
        "moved[name] = trained - self.rows.part(frozen_O, name)", "moved[name] = trained",
        f"{PEFT} all-biases"),
    bug(0, "a bias that trains nothing", BIASES,
        "return out + self.rows.stacked(moved, frozen_O), bias", "return out, bias",
        f"{PEFT} all-biases"),
    bug(0, "biases in the order of projections, not of query groups", FUSED,
        "return torch.cat(blocks, dim=-1).flatten()",
        "return torch.cat([block.flatten() for block in blocks])", f"{PEFT} own-biases"),
    bug(0, "a bias of k in as many parts as there are ranks", WEIGHT,
        "                    max_shards=projection.max_shards(shape) if projection.max_shards else"
        " None,\n", "", f"{PEFT} tp4"),
    bug(0, "lora_only that trains all biases", WHOLE,
        'if lora.bias == "lora_only":', "if False:", f"{FILES} beside"),
    bug(0, "a file whose adapted biases PEFT does not find", "megalora/adapters/write/whole.py",
        "is_adapted=weight.module in adapted", "is_adapted=False", f"{FILES} read_merged"),
    bug(0, "a file that says lora_only of all biases", WHOLE,
        "if sorted(shape.biases) == sorted(own):", "if own:", f"{FILES} read_merged"),
    bug(0, "lora_only read as all", READ,
        "return [weight for weight in every if weight.module in adapted]", "return every",
        f"{FILES} read_merged"),
    bug(0, "biases of the base beside those of B", READ,
        'if config.get("lora_bias"):', "if False:", f"{FILES} bad_biases"),
    bug(0, "vLLM given biases of the base", "megalora/adapters/read/options.py",
        '"bias": Option("honoured", refused_by=("vllm", "sglang")),', '"bias": HONOURED,',
        f"{FILES} no_server"),
)  # fmt: skip
