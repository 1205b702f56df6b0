"""Make adapters as training leaves them, on small models of several families, and add their deltas
to the weights of transformers' own model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megalora.adapters.write.engines import FileFormat
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.tiny import make_tiny

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
LAYER_2_EXPERTS = r"layers\.2\.mlp\.experts\.\d+"
# Sections ``lora``, all of which megalora trains. Files are narrower: PEFT 0.21 makes one adapter
# of an expert's gate and up, with one rank and one scale, and reads no pattern for them. So each
# case that gives experts' projections different settings, or leaves one out, needs padding, zeros
# or a scale that is folded into B.
MOE_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "ranks": {
        "target_modules": [*EXPERTS, "q_proj"],
        "rank_pattern": {"gate_proj": 2, "up_proj": 3, "down_proj": 5, "q_proj": 7},
    },
    "expert rank": {"expert_rank": 3},
    "expert rank by a rule": {"rank": 12, "expert_rank": "top_k"},
    "shared outer": {"share_outer": True, "rank_pattern": {"up_proj": 3, "down_proj": 5}},
    "alphas": {
        "alpha_pattern": {"gate_proj": 8.0, "up_proj": 3.0, "down_proj": 20.0, "o_proj": 2.5}
    },
    "ranks and alphas": {
        "rank_pattern": {"up_proj": 3, "k_proj": 6},
        "alpha_pattern": {"up_proj": 5.0, "k_proj": 7.0},
    },
    "rslora": {"use_rslora": True},
    "rslora and ranks": {
        "use_rslora": True,
        "rank_pattern": {"up_proj": 3, "down_proj": 5, "v_proj": 7},
    },
    "layers": {"layers": [0, 2]},
    "layers and ranks": {"layers": "1-2", "rank_pattern": {"gate_proj": 2, "down_proj": 5}},
    # The other two are written as zeros, in adapted layers alone.
    "gate only": {"target_modules": ["gate_proj"]},
    "up only": {"target_modules": ["up_proj"], "layers": [3]},
    "down only": {"target_modules": ["down_proj"]},
    "gate and up": {"target_modules": ["gate_up_proj"]},
    "gate and down": {
        "target_modules": ["gate_proj", "down_proj"],
        "rank_pattern": {"down_proj": 6},
    },
    "attention": {"target_modules": ["qkv_proj", "o_proj"]},
    "lm_head": {"target_modules": ["lm_head", "down_proj"], "rank_pattern": {"lm_head": 3}},
    # PEFT adapts the router's weight as a parameter, whose patterns it looks up under another name.
    "router": {"target_modules": ["gate"]},
    "router among others": {
        "target_modules": ["gate", *ATTENTION, *EXPERTS],
        "rank_pattern": {"gate": 3},
        "alpha_pattern": {"gate": 5.0},
    },
    "router by layer": {
        "target_modules": ["gate", "q_proj"],
        "rank_pattern": {r"layers\.1\.mlp\.gate": 3},
        "alpha_pattern": {r"layers\.3\.mlp\.gate": 5.0},
    },
    # Settings of one layer: keys of patterns must be expressions that no other layer matches.
    "attention by layer": {
        "target_modules": ATTENTION,
        "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 6},
        "alpha_pattern": {r"layers\.[01]\.self_attn\.o_proj": 6.0},
    },
    "down by layer": {
        "target_modules": EXPERTS,
        "rank_pattern": {rf"{LAYER_2_EXPERTS}\.down_proj": 6},
        "alpha_pattern": {r"layers\.1\.mlp\.experts\.\d+\.down_proj": 6.0},
    },
    "gate and up by layer": {
        "target_modules": EXPERTS,
        "rank_pattern": {rf"{LAYER_2_EXPERTS}\.gate_proj": 6},
        "alpha_pattern": {rf"{LAYER_2_EXPERTS}\.up_proj": 6.0},
    },
    "gate in one layer, down in another": {
        "target_modules": [r"layers\.0\..*gate_proj", r"layers\.3\..*down_proj"]
    },
}
DENSE_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "ranks and alphas": {"rank_pattern": {"gate_proj": 2, "up_proj": 3, "q_proj": 7},
                         "alpha_pattern": {"up_proj": 9.0}},
    "by layer, with lm_head": {"target_modules": [*EXPERTS, "lm_head"], "layers": "1-",
                               "rank_pattern": {r"layers\.2\.mlp\.down_proj": 6}},
}  # fmt: skip
# Layer 1 is dense. PEFT turns the names of experts' projections into parameters for the whole
# model, so that the dense layer's own must be named as parameters too.
MIXED_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "expert rank": {"expert_rank": 3},
    "up only": {"target_modules": ["up_proj"]},
    "experts only": {"layers": [0, 2, 3]},
    "dense layer only": {"layers": [1]},
    "one projection of the dense layer": {"target_modules": ["up_proj", "q_proj"], "layers": [1],
                                          "rank_pattern": {"up_proj": 3}},
    "dense down and q": {"rank_pattern": {r"layers\.1\.mlp\.down_proj": 6, "q_proj": 5},
                         "alpha_pattern": {"down_proj": 5.0}},
}  # fmt: skip
# The same names three times: routed experts, a shared one in layers 0 and 2, a dense MLP in 1.
SHARED_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "shared, routed and dense differ": {"expert_rank": 3,
                                        "rank_pattern": {r"shared_expert\.(gate|up)_proj": 6},
                                        "alpha_pattern": {r"shared_expert\.down_proj": 5.0}},
    "shared expert only": {"target_modules": [r"shared_expert\..*_proj"]},
    "one projection of the shared expert": {"target_modules": [r"shared_expert\.up_proj", "v_proj"],
                                            "layers": [0, 2]},
    "rslora and router": {"target_modules": ["gate", *ATTENTION, *EXPERTS], "use_rslora": True},
}  # fmt: skip
# An adapted head must leave the embedding alone, whose weight it shares.
TIED_CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "lm_head": {"target_modules": ["lm_head", "v_proj"]},
}
BASES = {
    "moe": MOE_CASES,
    "dense": DENSE_CASES,
    "mixed": MIXED_CASES,
    "tied": TIED_CASES,
    "shared": SHARED_CASES,
}


def _cases() -> Iterator[Any]:
    for base, cases in BASES.items():
        for name, options in cases.items():
            # alpha is not rank, so that a scale of 1 in place of alpha / rank is seen.
            options = {"rank": 4, "alpha": 12.0, **options}
            yield pytest.param(base, options, id=f"{base}: {name}")


CASES = list(_cases())
"""(base, section ``lora``) of all above."""


def make_bases(folder: Path, moe: Path, dense: Path) -> dict[str, Path]:
    """The bases of ``BASES``, of which the first two exist already."""
    mixed = make_tiny(folder / "mixed", mlp_only_layers=[1])
    tied = make_tiny(folder / "tied", tie_word_embeddings=True, num_hidden_layers=2)
    shared = make_tiny(
        folder / "shared", arch="qwen2_moe", mlp_only_layers=[1], num_hidden_layers=3
    )
    return {"moe": moe, "dense": dense, "mixed": mixed, "tied": tied, "shared": shared}


@dataclass
class Trained:
    """An adapter as training leaves it, and the folder that export made of it."""

    base: Path
    shape: ModelShape
    adapted: list[Adapted]
    tensors: dict[str, Tensor]
    """A [rank, in] and B [out, rank] of every linear as trained, by name: neither padded nor with a
    scale folded in."""
    folder: Path

    def deltas(self) -> Iterator[tuple[Adapted, int | None, Tensor]]:
        """(adapted, expert, scale * B A) for every linear."""
        for a in self.adapted:
            for expert in experts_of(a):
                a_factor = self.tensors[a.tensor_name("A", expert)]
                b_factor = self.tensors[a.tensor_name("B", expert)]
                yield a, expert, a.scale * b_factor @ a_factor


def experts_of(a: Adapted) -> Iterable[int | None]:
    """Every expert of an adapted linear, or None for one that is not an expert's."""
    return range(a.num_experts) if a.num_experts else [None]


def ranks_of(adapted: list[Adapted]) -> list[tuple[Any, ...]]:
    """What is adapted in every layer, and its rank."""
    return [(a.projection, a.layer, a.rank) for a in adapted]


def train(
    base: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    layout: FileFormat = "per_expert",
    **options: Any,
) -> Trained:
    """Draw an adapter of what ``options`` of the ``lora`` section select, and write it to
    ``folder``."""
    shape = model_shape(read_hf_config(base))
    adapted = resolve(LoRAConfig(**options), shape)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for a in adapted:
        for expert in range(max(1, a.num_experts)):
            a_factor = torch.randn(a.shape("A"), generator=generator)
            b_factor = torch.randn(a.shape("B"), generator=generator)
            # A x is about 1 for each rank, and scale * B A x about 0.2 whatever rank and scale are.
            b_factor *= 0.2 / (a.scale * a.rank**0.5)
            # What experts share is the last one's.
            tensors[a.tensor_name("A", expert)] = (a_factor / a.in_features**0.5).to(dtype)
            tensors[a.tensor_name("B", expert)] = b_factor.to(dtype)
    folder.mkdir(exist_ok=True)
    write_adapter(folder, adapted, shape, tensors, str(base), layout)
    return Trained(base, shape, adapted, tensors, folder)


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def merged_by_hand(trained: Trained, model: Any = None) -> Any:
    """transformers' own model with the deltas added to its weights; gate rows stand before up rows.

    ``model``: the base, which is changed; None to load it.
    """
    # Neither PEFT nor merge has a part in this: it is what both are compared with.
    model = load_base(trained.base) if model is None else model
    for a, expert, delta in trained.deltas():
        if expert is None:
            linear = model.get_submodule(a.projection.loaded.format(layer=a.layer))
            # A new parameter: a tied embedding stays as it is.
            linear.weight = nn.Parameter(linear.weight + delta)
            continue
        experts = model.get_submodule(f"model.layers.{a.layer}.mlp.experts")
        # transformers 5 has gate_up_proj [experts, 2 intermediate, hidden] and down_proj [experts,
        # hidden, intermediate] for all experts of a layer.
        size = trained.shape.expert_intermediate
        rows = {"gate_proj": slice(0, size), "up_proj": slice(size, 2 * size)}
        if a.projection.role == "down_proj":
            weight = experts.down_proj[expert]
        else:
            weight = experts.gate_up_proj[expert][rows[a.projection.role]]
        weight += delta
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits [2, 23, vocabulary] of two fixed sequences of random tokens."""
    # The tiny models know 512 tokens.
    tokens = torch.randint(512, (2, 23), generator=torch.Generator().manual_seed(7))
    return model(tokens).logits
