"""Write the README.md of an exported adapter: what it is, what it was trained on, and how to load
it where."""

from dataclasses import dataclass
from typing import Any

from megalora.adapters.files import PARTS
from megalora.adapters.trained_on import TrainedOn
from megalora.adapters.write.card_objective import objective_line
from megalora.adapters.write.engines import ENGINES, VLLM_RANKS, vllm_max_rank
from megalora.hf.tensor_names import within_layer
from megalora.lora.spec import Adapted, has_biases, has_magnitudes, in_parts

_HARMLESS = (
    'PEFT 0.21 may warn of `rank_pattern` and `alpha_pattern` keys that "did not match any targeted'
    ' module and were ignored" (it does apply them: experts and routers are parameters in'
    ' transformers 5), of "missing adapter keys" (in layers that were not adapted, where it adds'
    ' zeros) and of "tie_word_embeddings=True" (the embedding itself stays as it is). This is'
    " harmless: `megalora verify` compares the logits."
)
"""What PEFT's warnings (``PEFT_WARNINGS``) mean for who loads the adapter."""


@dataclass(frozen=True)
class Facts:
    """Everything the card says that is not in the adapter's own files."""

    base: str
    folder_name: str
    layout: str
    engine: str | None
    adapted: list[Adapted]
    """Projections as trained."""
    zeros: list[str]
    """HF names, with {layer} and {expert}, of projections that the file holds as zeros because
    engines expect them."""
    absent: list[str]
    """HF names of single experts' linears, zeros in the file for the same reason."""
    dropped: list[str]
    """Projections that were trained and left out."""
    loads_in_peft: bool
    num_scores: int
    """Numbers that its score head gives; 0 for a language model."""
    saved: list[str]
    """What is trained whole of the base, as PEFT's ``modules_to_save`` names it."""
    biases: tuple[str, ...]
    """HF linears of the base whose biases are trained."""
    tokens: tuple[int, ...]
    """Tokens whose rows of the embedding are trained."""
    run: dict[str, Any] | None
    """``training_state/state.json`` of the checkpoint; None for an adapter made elsewhere."""
    trained_on: TrainedOn | None = None
    """The base as it was trained on; None where the adapter does not say."""


def card(facts: Facts) -> str:
    """The whole file, as Markdown with the front matter that the Hub reads."""
    parts = [_front_matter(facts), _what(facts), _table(facts), _notes(facts), _loading(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: Facts) -> str:
    tag = "text-classification" if facts.num_scores else "text-generation"
    return (
        f"---\nbase_model: {facts.base}\nlibrary_name: peft\npipeline_tag: {tag}\ntags: [lora,"
        " megalora]\n---"
    )


def _what(facts: Facts) -> str:
    run = facts.run
    if run and "config" not in run:
        run = None  # an imported adapter that was not trained on
    made = "trained with megalora" if run else "made elsewhere and exported by megalora"
    method = "DoRA" if has_magnitudes(facts.adapted) else "LoRA"
    if in_parts(facts.adapted):
        method = "DoRA and LoRA"
    lines = [f"# {facts.folder_name}", "", f"A {method} adapter for `{facts.base}`, {made}."]
    if run:
        config = run["config"]
        step = run["step"]
        train = config["train"]
        # Checkpoints of earlier versions have no such section.
        objective = config.get("objective", {"name": "sft"})
        is_paired = objective["name"] in ("dpo", "simpo", "orpo", "reward")
        samples = "pairs" if is_paired else "samples"
        lines += [
            "",
            f"- Training data: `{config['data']['train']}`, {run['num_samples']:,} {samples}",
            f"- Objective: {objective_line(objective)}",
            (
                f"- Steps: {step:,} of {train['global_batch_size']} {samples}, learning rate"
                f" {train['lr']:g} ({train['schedule']})"
            ),
            f"- Base weights and adapter in {config['model']['dtype']}",
        ]
        # Checkpoints of earlier versions have no such option.
        init = config.get("lora", {}).get("init", "lora")
        if init != "lora":
            lines.append(
                f"- Initialised from the base weights: {init}. A holds A0 + dA and dA, B holds dB"
                " and B0, so that the file fits the base as published"
            )
    if said := base_line(facts):
        lines += ["", said]
    return "\n".join(lines)


def base_line(facts: Facts) -> str:
    """What must be known of a base whose values were quantised; nothing of a plain one."""
    known = facts.trained_on
    if known is None or not known.is_quantised:
        return ""
    said = f"trained on a base that was {known.words()}"
    if not known.is_rounded:
        return f"{said}; whoever loads that folder must decode it to the same values"
    return (
        f"{said}; loaded onto the plain base it is another model, by the error of quantising."
        " megalora verify, eval and chat quantise the base in the same way"
    )


def _table(facts: Facts) -> str:
    rows: list[str] = []
    if facts.num_scores:
        rows += [_score(facts), ""]
    if facts.saved:
        rows += [f"Trained whole: {', '.join(f'`{name}`' for name in facts.saved)}", ""]
    if facts.biases:
        names = dict.fromkeys(within_layer(module) for module in facts.biases)
        shown = ", ".join(f"`{name}`" for name in names)
        rows += [f"Trained biases of the base: {len(facts.biases)}, of {shown}", ""]
    if facts.tokens:
        count = len(facts.tokens)
        rows += [f"Trained rows of the embedding: {count} tokens, {ranges(list(facts.tokens))}", ""]
    rows += ["| projection | rank | scale | layers | experts |", "|---|--:|--:|---|--:|"]
    # A row for each projection, and another where some of its layers have another rank or scale.
    groups: dict[tuple[str, int, float, int], list[int]] = {}
    for a in facts.adapted:
        layers = groups.setdefault((a.projection.hf, a.rank, a.scale, a.num_experts), [])
        if a.layer is not None:
            layers.append(a.layer)
    for (hf, rank, scale, experts), layers in groups.items():
        numbers = ranges(layers)
        rows.append(f"| `{_short(hf)}` | {rank} | {scale:.6g} | {numbers} | {experts or ''} |")
    return "\n".join(rows)


def _label_names(facts: Facts) -> list[str]:
    """Names of the labels, in the order of their numbers; none where they have none."""
    options = (facts.run or {}).get("config", {}).get("objective", {})
    return list(options.get("labels") or ())


def _score(facts: Facts) -> str:
    """A line about the score head."""
    # PEFT calls the labels by numbers unless the base is told their names.
    size = f"`score.weight`, trained whole: {facts.num_scores:,} x hidden"
    names = _label_names(facts)
    if names:
        return f"{size}; labels {', '.join(f'{i} {name}' for i, name in enumerate(names))}"
    return size


def _short(hf: str) -> str:
    """A projection's name without the layer and the expert."""
    return within_layer(hf).replace(".{expert}", "")


def coverage(adapted: list[Adapted]) -> list[str]:
    """A line that shows a lost layer: which layers each projection is adapted in."""
    layers: dict[str, list[int]] = {}
    for a in adapted:
        of_projection = layers.setdefault(a.name, [])
        if a.layer is not None:
            of_projection.append(a.layer)
    parts = []
    for name, numbers in layers.items():
        # The head is in no layer.
        parts.append(f"{name} in layers {ranges(numbers)}" if numbers else name)
    return [f"adapts {'; '.join(parts)}"]


def ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2, 5``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        # A number that follows the last one prolongs its run.
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    shown = []
    for run in runs:
        first = run[0]
        last = run[-1]
        shown.append(str(first) if first == last else f"{first}-{last}")
    return ", ".join(shown)


def _notes(facts: Facts) -> str:
    """A list of what is in the file and does not act, and of what was left out."""
    lines = []
    if facts.zeros:
        names = ", ".join(f"`{_short(hf)}`" for hf in facts.zeros)
        lines.append(
            f"- {names}: not trained; zeros in this file, because engines want it beside what was."
        )
    if facts.absent:
        lines.append(
            f"- {len(facts.absent)} linears of single experts, such as `{facts.absent[0]}`: no"
            " adapter; zeros in this file."
        )
    if facts.dropped:
        lines.append(
            f"- Trained and left out of this file: {', '.join(f'`{d}`' for d in facts.dropped)}."
        )
    if any(a.shared for a in facts.adapted):
        # The file says it nowhere: to who reads it, each expert has an A and a B.
        form = "once" if facts.layout == "shared_outer" else "as a copy for each"
        lines.append(
            "- The experts of a layer were trained with one A of gate and up and one B of down,"
            f" which are in this file {form}."
        )
    trained = {a.name for a in facts.adapted}
    for engine in ENGINES.values():
        for name, does in engine.not_honoured.items():
            if name in trained:
                lines.append(f"- {engine.title} {does} (`{name}`).")
    return "\n".join(lines)


def _loading(facts: Facts) -> str:
    """How to load the file, for each engine that reads its layout."""
    rank = max(a.rank for a in facts.adapted)
    sections = []
    if facts.num_scores:
        return _loading_scores(facts)
    if facts.layout in ("per_expert", "stacked") and facts.loads_in_peft:
        sections.append(
            "## transformers and PEFT\n\n```python\nfrom peft import PeftModel\nfrom transformers"
            " import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{facts.base}")\n'
            f"{_peft_model(facts)}\n```\n\n{_HARMLESS}"
        )
    # vLLM serves no adapter of a larger rank: better no command than one that fails.
    if what := _not_served(facts):
        # What a quantised base was made from is not known here.
        known = facts.trained_on
        is_quantised = known is not None and known.is_quantised
        original = " --original MODEL_IT_WAS_MADE_FROM" if is_quantised else ""
        sections.append(
            f"## Servers\n\nvLLM and SGLang do not load {what}. Merge it into the base for them:"
            "\n\n"
            f"```bash\nmegalora merge {facts.folder_name} --base {facts.base}{original} --out"
            " merged\n```"
        )
    elif facts.layout == "per_expert" and rank <= VLLM_RANKS[-1]:
        sections.append(
            f"## vLLM\n\n```bash\nvllm serve {facts.base} --enable-lora --max-lora-rank"
            f" {vllm_max_rank(rank)} --lora-modules"
            f" {facts.folder_name}=./{facts.folder_name}\nmegalora serve {facts.folder_name} --base"
            f" {facts.base}    # the same, and proves that the adapter acts\n```"
        )
    if facts.engine == "sglang":
        targets = " ".join(sorted({a.name for a in facts.adapted}))
        flag = " --experts-shared-outer-loras" if facts.layout == "shared_outer" else ""
        sections.append(
            f"## SGLang\n\n```bash\npython -m sglang.launch_server --model-path {facts.base}"
            f" --enable-lora --max-lora-rank {rank}{flag} \\\n    --lora-target-modules {targets}"
            f" --lora-paths {facts.folder_name}=./{facts.folder_name}\n```"
        )
    return "\n\n".join(sections)


def _not_served(facts: Facts) -> str:
    """What no server loads of the adapter; nothing where they load all."""
    if has_magnitudes(facts.adapted):
        return "DoRA"
    if has_biases(facts.adapted):
        return "biases of B (`lora_bias`)"
    if facts.saved:
        return "weights that are trained whole (`modules_to_save`)"
    if facts.biases:
        return "biases of the base (`bias`)"
    return "rows of an embedding (`trainable_token_indices`)" if facts.tokens else ""


def _peft_model(facts: Facts) -> str:
    """Python lines that make PEFT's model of ``base``; of two folders where only some linears have
    DoRA, for PEFT has it on all that a folder adapts, or on nothing."""
    folder = facts.folder_name
    if not in_parts(facts.adapted):
        return f'model = PeftModel.from_pretrained(base, "{folder}")'
    first, second = PARTS
    return (
        "# Half of the adapter each: both must act.\n"
        f'model = PeftModel.from_pretrained(base, "{folder}/{first}", adapter_name="{first}")\n'
        f'model.load_adapter("{folder}/{second}", adapter_name="{second}")\n'
        f'model.base_model.set_adapter(["{first}", "{second}"])'
    )


def _loading_scores(facts: Facts) -> str:
    """How to load a classifier or reward model: neither its number of labels nor the padding token
    is in the adapter's files."""
    sections = []
    if facts.loads_in_peft:
        sections.append(_scores_in_peft(facts))
    rank = max(a.rank for a in facts.adapted)
    if facts.layout == "per_expert" and rank <= VLLM_RANKS[-1] and not _not_served(facts):
        sections.append(_scores_in_vllm(facts, rank))
    return "\n\n".join(sections)


def _scores_in_vllm(facts: Facts, rank: int) -> str:
    """vLLM has the base as a classifier whose head is this adapter's."""
    labels = f"'{{\"num_labels\": {facts.num_scores}}}'"
    return (
        f"## vLLM\n\n```bash\nvllm serve {facts.base} --runner pooling --convert classify"
        f" --hf-overrides {labels} \\\n    --enable-lora --max-lora-rank {vllm_max_rank(rank)}"
        f" --lora-modules {facts.folder_name}=./{facts.folder_name}\n"
        "curl http://127.0.0.1:8000/classify -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{facts.folder_name}", "input": "A text", "use_activation": false}}\''
        "\n```\n\nWithout `use_activation` it gives probabilities in place of scores. It reads them"
        " from the last token, so leave out padding tokens at a text's end."
    )


def _scores_in_peft(facts: Facts) -> str:
    names = _label_names(facts)
    # As Python code, which names may have to be escaped for.
    more = ""
    if names:
        id2label = dict(enumerate(names))
        label2id = {name: number for number, name in id2label.items()}
        more = f", id2label={id2label!r}, label2id={label2id!r}"
    return (
        "## transformers and PEFT\n\n```python\nfrom peft import PeftModel\nfrom transformers"
        " import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.base}")\n'
        "base = AutoModelForSequenceClassification.from_pretrained(\n"
        f'    "{facts.base}", num_labels={facts.num_scores}{more}\n)\n'
        "# The score is read from the last token that is not this one.\n"
        "base.config.pad_token_id = tokenizer.pad_token_id\n"
        f'model = PeftModel.from_pretrained(base, "{facts.folder_name}")\n```'
        f"\n\n{_HARMLESS}"
    )
