"""README.md of an exported adapter: what it is, what it was trained on, and how to load it
where."""

from dataclasses import dataclass
from typing import Any

from megalora.adapters.write.engines import ENGINES, VLLM_RANKS, vllm_max_rank
from megalora.hf.tensor_names import within_layer
from megalora.lora.spec import Adapted


@dataclass(frozen=True)
class Facts:
    """Everything the card says that is not in the adapter's own files."""

    base: str
    folder_name: str
    layout: str
    engine: str | None
    adapted: list[Adapted]
    """As trained."""
    zeros: list[str]
    """HF names, with {layer} and {expert}, of what the file holds as zeros because engines expect
    it."""
    absent: list[str]
    """HF names of single experts' linears, likewise."""
    dropped: list[str]
    """Projections that were trained and left out."""
    loads_in_peft: bool
    run: dict[str, Any] | None
    """``training_state/state.json`` of the checkpoint; None for an adapter made elsewhere."""


def card(facts: Facts) -> str:
    parts = [_front_matter(facts), _what(facts), _table(facts), _notes(facts), _loading(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: Facts) -> str:
    return (
        f"---\nbase_model: {facts.base}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:"
        " [lora, megalora]\n---"
    )


def _what(facts: Facts) -> str:
    run = facts.run if facts.run and "config" in facts.run else None  # an import has no config
    made = "trained with megalora" if run else "made elsewhere and exported by megalora"
    lines = [f"# {facts.folder_name}", "", f"A LoRA adapter for `{facts.base}`, {made}."]
    if run:
        config = run["config"]
        step = run["step"]
        train = config["train"]
        lines += [
            "",
            f"- Training data: `{config['data']['train']}`, {run['num_samples']:,} samples",
            (
                f"- Steps: {step:,} of {train['global_batch_size']} samples, learning rate"
                f" {train['lr']:g} ({train['schedule']})"
            ),
            f"- Base weights and adapter in {config['model']['dtype']}",
        ]
    return "\n".join(lines)


def _table(facts: Facts) -> str:
    rows = ["| projection | rank | scale | layers | experts |", "|---|--:|--:|---|--:|"]
    groups: dict[tuple[str, int, float, int], list[int | None]] = {}
    for a in facts.adapted:
        groups.setdefault((a.projection.hf, a.rank, a.scale, a.num_experts), []).append(a.layer)
    for (hf, rank, scale, experts), layers in groups.items():
        rows.append(
            f"| `{_short(hf)}` | {rank} | {scale:.6g} |"
            f" {ranges([n for n in layers if n is not None])} | {experts or ''} |"
        )
    return "\n".join(rows)


def _short(hf: str) -> str:
    """A projection's name without the layer and the expert."""
    return within_layer(hf).replace(".{expert}", "")


def coverage(adapted: list[Adapted]) -> list[str]:
    """A line that shows a lost layer: which layers each projection is adapted in."""
    layers: dict[str, list[int]] = {}
    for a in adapted:
        layers.setdefault(a.name, []).extend([] if a.layer is None else [a.layer])
    return [
        "adapts "
        + "; ".join(
            f"{name}{f' in layers {ranges(of)}' if of else ''}" for name, of in layers.items()
        )
    ]


def ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2, 5``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _notes(facts: Facts) -> str:
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
    honoured = {a.name for a in facts.adapted}
    for engine in ENGINES.values():
        lines += [
            f"- {engine.title} {does} (`{p}`)."
            for p, does in engine.not_honoured.items()
            if p in honoured
        ]
    return "\n".join(lines)


def _loading(facts: Facts) -> str:
    rank = max(a.rank for a in facts.adapted)
    sections = []
    if facts.layout in ("per_expert", "stacked") and facts.loads_in_peft:
        sections.append(
            "## transformers and PEFT\n\n```python\nfrom peft import PeftModel\nfrom transformers"
            " import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{facts.base}")\n'
            f'model = PeftModel.from_pretrained(base, "{facts.folder_name}")\n```'
        )
    if facts.layout == "per_expert" and rank <= VLLM_RANKS[-1]:
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
