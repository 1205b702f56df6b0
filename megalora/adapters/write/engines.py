"""List which adapter layouts PEFT, vLLM and SGLang read, and what each would leave out without a
word.

engine          layouts                  router (gate)             lm_head    read from
PEFT 0.21       per expert, stacked      honoured                  honoured   run in tests/adapters
vLLM 0.32       per expert               loads, has no effect      honoured   run in tests/serve
SGLang 0.5.23   uniform, shared outer    fails at first request    honoured   its source; not run
"""

import warnings
from dataclasses import dataclass
from typing import Literal

from megalora.lora.spec import Adapted, has_biases, has_magnitudes
from megalora.model.families import FAMILIES
from megalora.model.projections import ATTENTION
from megalora.model.shape import ModelShape

EngineName = Literal["peft", "vllm", "sglang"]
FileFormat = Literal["per_expert", "stacked", "uniform", "shared_outer"]
"""How experts' factors lie in an adapter file; see ``form.py``."""


PEFT_WARNINGS = (
    "The following rank_pattern keys did not match any targeted module and were ignored",
    "The following alpha_pattern keys did not match any targeted module and were ignored",
    "Found missing adapter keys while loading the checkpoint",
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
)
"""Beginnings of all that PEFT 0.21 warns of when it loads what megalora writes; docs/adapters.md
says why each is harmless."""


def hide_peft_warnings() -> None:
    """Ignore these warnings of PEFT and no others, until ``warnings.catch_warnings`` ends or for as
    long as the process runs."""
    for harmless in PEFT_WARNINGS:
        warnings.filterwarnings("ignore", message=harmless)


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` may be."""


def vllm_max_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` that holds an adapter of ``rank``; None where none does."""
    # vLLM takes these alone, not any number.
    for largest in VLLM_RANKS:
        if rank <= largest:
            return largest
    return None


@dataclass(frozen=True)
class Engine:
    """An engine's name, and what it reads of an adapter."""

    title: str
    layouts: dict[str, FileFormat]
    """Name of a layout on the command line -> the form written; the first is the default."""
    not_honoured: dict[str, str]
    """Projection -> what the engine does instead of applying its adapter."""


PEFT_LAYOUTS: dict[str, FileFormat] = {"per_expert": "per_expert", "stacked": "stacked"}
ENGINES: dict[EngineName, Engine] = {
    "peft": Engine("PEFT 0.21", PEFT_LAYOUTS, {}),
    "vllm": Engine(
        "vLLM 0.32", {"per_expert": "per_expert"}, {"gate": "loads it and then ignores it"}
    ),
    "sglang": Engine(
        "SGLang 0.5.23",
        {"per_expert": "uniform", "shared_outer": "shared_outer"},
        {"gate": "fails at the first request"},
    ),
}


def check_engine(name: EngineName, layout: str, adapted: list[Adapted], shape: ModelShape) -> None:
    """Raise ``ValueError`` where the engine would not load the adapter or would leave part of it
    out; ``adapted`` is without what the user dropped."""
    engine = ENGINES[name]
    # vLLM takes the head beside A and B, on a base that is started as a classifier (the card).
    if shape.num_scores and name == "sglang":
        raise ValueError(
            f"{engine.title} serves this adapter's base as a language model, without the score head"
            " that was trained in place of lm_head. Merge it into a classifier's folder: megalora"
            " merge ADAPTER --base BASE --out FOLDER; vLLM loads it as it is: export --for vllm"
        )
    if (shape.saved or shape.tokens or shape.biases) and name != "peft":
        what = "modules_to_save" if shape.saved else "trainable_token_indices"
        if shape.biases:
            what = "bias"
        raise ValueError(
            f"{engine.title} does not load weights of the base that were trained themselves"
            f" (lora.{what}): its adapters are A and B. Merge it into the base: megalora merge"
        )
    if layout not in engine.layouts:
        raise ValueError(f"--layout {layout}: {engine.title} reads {' or '.join(engine.layouts)}")
    # What an engine would load and leave out without a word.
    check_honoured(name, adapted, shape)
    if name != "peft" and has_magnitudes(adapted):
        raise ValueError(
            f"{engine.title} does not load DoRA (lora.use_dora): no matrices of a low rank do what"
            " a magnitude for each row does. Merge it into the base: megalora merge"
        )
    if name != "peft" and has_biases(adapted):
        raise ValueError(
            f"{engine.title} does not load biases of B (lora.lora_bias). Merge the adapter into the"
            " base: megalora merge"
        )
    # Of experts alone: other linears load everywhere.
    experts = [a for a in adapted if a.projection.is_expert]
    if name == "peft":
        check_dora(adapted, shape)
    if name == "peft" and not loads_in_peft(layout, adapted, shape):
        raise ValueError(
            f"{engine.title} cannot load adapters of {shape.model_type}'s experts, one for each:"
            " its table lacks that model. Export with --layout stacked"
        )
    if name == "sglang":
        _check_sglang(engine, experts, shape)


def check_dora(adapted: list[Adapted], shape: ModelShape) -> None:
    """Raise ``ValueError`` for DoRA that no file carries to an engine: PEFT has none on parameters,
    which experts are in transformers 5, and servers have none at all."""
    if _dora_beside(adapted, shape):
        raise ValueError(
            f"{ENGINES['peft'].title} takes DoRA on attention alone in a model with routed experts,"
            " whose MLPs it adapts as parameters, and this adapter has it on an MLP. Merge it into"
            " the base: megalora merge"
        )


def _check_sglang(engine: Engine, experts: list[Adapted], shape: ModelShape) -> None:
    """Raise ``ValueError`` for adapters of experts that SGLang fails on."""
    for a in experts:
        # w1, w2, w3: SGLang looks for gate_proj, up_proj and down_proj.
        if a.projection.in_memory:
            raise ValueError(
                f"{engine.title} knows no adapters of linears called {a.name}, as"
                f" {shape.model_type}'s experts have them; merge it: megalora merge"
            )
    # SGLang looks for experts in every layer.
    is_mixed = 0 < len(shape.moe_layers) < shape.num_layers
    if experts and is_mixed:
        raise ValueError(
            f"{engine.title} fails on adapters of models with dense layers among MoE layers; merge"
            " it: megalora merge"
        )


def check_honoured(name: EngineName, adapted: list[Adapted], shape: ModelShape) -> None:
    """Raise ``ValueError`` for a projection whose adapter the engine would not apply."""
    engine = ENGINES[name]
    family = FAMILIES[shape.model_type]
    # Some families have linears that an engine holds in a form which takes no adapter.
    # Nothing is known of families in SGLang beyond its own table.
    of_family = {"peft": family.peft.not_honoured, "vllm": family.vllm.not_honoured}
    not_honoured = engine.not_honoured | dict(of_family.get(name, {}))
    for projection in dict.fromkeys(a.name for a in adapted):
        if does := not_honoured.get(projection):
            raise ValueError(
                f"{engine.title} does not honour the adapter of {projection}, which was trained: it"
                f" {does}. Export with --drop {projection} to leave it out, or merge the adapter"
                " into the base: megalora merge"
            )


def loads_in_peft(layout: str, adapted: list[Adapted], shape: ModelShape) -> bool:
    """Whether PEFT 0.21 reads an adapter of this family in that layout."""
    peft = FAMILIES[shape.model_type].peft
    if any(a.name in peft.not_honoured for a in adapted):
        return False
    if _dora_beside(adapted, shape):
        return False
    experts = any(a.projection.is_expert for a in adapted)
    return layout == "stacked" or not experts or peft.per_expert


def _dora_beside(adapted: list[Adapted], shape: ModelShape) -> bool:
    """Whether DoRA is on an MLP of a model with experts: PEFT 0.21 can name its linears as
    parameters alone there (``peft_config.module_entries``), and has no DoRA on parameters."""
    for a in adapted:
        if "M" in a.factors and shape.moe_layers and a.projection not in ATTENTION:
            return True
    return False
