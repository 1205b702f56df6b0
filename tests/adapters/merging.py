"""Make bases as published and as transformers saves them and adapters to merge into them, and read
the weights of merged folders."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalora.adapters.merge import merge
from megalora.adapters.write.engines import FileFormat
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.hf.folder import weight_shards
from megalora.hf.json_file import read_hf_config
from megalora.lora.spec import Adapted
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.tiny import make_tiny
from tests.adapters.folders import factors_of
from tests.parity.built import random_factors

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Every linear with a rank or an alpha of its own, so that settings of one for another show.
MOE_ALL = LoRAConfig(
    rank=4, alpha=12.0, target_modules=[*LINEAR, "gate", "lm_head"],
    rank_pattern={"q_proj": 3, "v_proj": 5, "up_proj": 2, "down_proj": 6, "gate": 7, "lm_head": 9},
    alpha_pattern={"k_proj": 3.0, "gate_proj": 20.0, "gate": 5.0},
)  # fmt: skip
DENSE_ALL = LoRAConfig(
    rank=4,
    alpha=12.0,
    target_modules=[*LINEAR, "lm_head"],
    rank_pattern={"up_proj": 2, "lm_head": 9},
)
# How a base's experts are stored decides how merge finds a weight: as published, a tensor for each
# expert, or "packed", as transformers 5 holds them in memory.
CASES = {
    "everything": ("moe", MOE_ALL),
    "everything, packed": ("moe packed", MOE_ALL),
    "rslora": ("moe", LoRAConfig(rank=4, alpha=6.0, expert_rank=2, use_rslora=True)),
    "some layers": ("moe packed",
                    LoRAConfig(rank=4, alpha=12.0, target_modules=["k_proj", "up_proj"],
                               layers="1-")),
    "a dense layer among moe layers": ("mixed", MOE_ALL),
    "a dense layer among moe layers, packed": ("mixed packed", MOE_ALL),
    "a shared expert": ("shared", MOE_ALL),
    "a shared expert, packed": ("shared packed", MOE_ALL),
    "dense": ("dense", DENSE_ALL),
    "dense in one file": ("one file", DENSE_ALL),
    "tied": ("tied", LoRAConfig(rank=4, alpha=12.0)),
    "tied, with lm_head": ("tied", MOE_ALL),
    "tied in one file, with lm_head": ("tied in one file", DENSE_ALL),
}  # fmt: skip


def resaved(base: Path, folder: Path, **options: Any) -> Path:
    """The same model as transformers writes it: in one file, or as ``options`` of save_pretrained
    say."""
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(
        folder, **options
    )
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every weight file, by name; none is in two."""
    everything: dict[str, Tensor] = {}
    for shard in weight_shards(folder):
        tensors = load_file(folder / shard)
        assert not tensors.keys() & everything.keys()
        everything |= tensors
    return everything


def rewrite(folder: Path, change: Any) -> None:
    """Replace every shard's tensors by ``change`` of them."""
    for shard in sorted(folder.glob("*.safetensors")):
        save_file(change(load_file(shard)), shard, metadata={"format": "pt"})


def copied(base: Path, folder: Path, change: Any = None) -> Path:
    """A copy of the base, whose shards' tensors went through ``change``."""
    shutil.copytree(base, folder)
    if change is not None:
        rewrite(folder, change)
    return folder


@dataclass
class Trained:
    """An adapter before and after it was written to a folder."""

    folder: Path
    shape: ModelShape
    adapted: list[Adapted]
    factors: dict[str, Tensor]

    def linears(self) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """(module, rank, delta, |scale| |B| |A|), in float64."""
        for a in self.adapted:
            for module in a.hf_modules():
                a_factor, b_factor = factors_of(self.factors, module)
                # In float64, whose own error is nothing beside float32's.
                a_factor = a_factor.double()
                b_factor = b_factor.double()
                delta = a.scale * b_factor @ a_factor
                # What a bound of the product's rounding error is a multiple of.
                magnitude = a.scale * b_factor.abs() @ a_factor.abs()
                yield module, a.rank, delta, magnitude


def train(
    base: Path, folder: Path, lora: LoRAConfig, size: float = 1.0, layout: FileFormat = "per_expert"
) -> Trained:
    """Random factors; every delta has a spread of about 0.2 * size of its weight's."""
    adapted, factors = random_factors(lora, base)
    # B alone, because a delta is B A.
    for name, factor in factors.items():
        if ".lora_B." in name:
            factors[name] = size * factor
    shape = model_shape(read_hf_config(base))
    folder.mkdir()
    write_adapter(folder, adapted, shape, factors, str(base), layout)
    return Trained(folder, shape, adapted, factors)


def make_bases_to_merge_into(folder: Path, moe: Path, dense: Path) -> dict[str, Path]:
    """Bases of every layout of weights: per expert and packed, sharded and in one file, tied."""
    small: dict[str, Any] = {"num_hidden_layers": 2, "mlp_only_layers": [1]}
    made = {
        "moe": moe,
        "dense": dense,
        "mixed": make_tiny(folder / "mixed", **small),
        "shared": make_tiny(folder / "shared", arch="qwen2_moe", **small),
        "tied": make_tiny(folder / "tied", tie_word_embeddings=True, num_hidden_layers=2),
        "one file": resaved(dense, folder / "one file"),
    }
    # Two tied ones: sharded, with experts, and dense in one file.
    tied = make_tiny(
        folder / "tied dense", arch="qwen3", tie_word_embeddings=True, num_hidden_layers=2
    )
    made["tied in one file"] = resaved(tied, folder / "tied in one file")
    for name in ("moe", "mixed", "shared"):
        # save_pretrained writes the published names unless it is told not to. Several shards: a
        # layer's tensors may lie in two of them.
        packed = resaved(
            made[name], folder / f"{name} packed", save_original_format=False, max_shard_size="1MB"
        )
        names = " ".join(read(packed))
        assert "mlp.experts.gate_up_proj" in names
        made[f"{name} packed"] = packed
    return made


def weight_of(tensors: dict[str, Tensor], module: str, tied: bool = False) -> Tensor:
    """The weight of one linear, wherever the base's layout has it: gate's rows stand before
    up's."""
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"]
    if module == "lm_head" and tied:
        return tensors["model.embed_tokens.weight"]
    experts, number, name = module.rsplit(".", 2)
    if name == "down_proj":
        return tensors[f"{experts}.down_proj"][int(number)]
    gate, up = tensors[f"{experts}.gate_up_proj"][int(number)].chunk(2)
    return {"gate_proj": gate, "up_proj": up}[name]


def refusal(adapter: Path, base: Path | str, out: Path) -> str:
    """What merge says, having left no trace beside ``out``."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(ValueError) as caught:
        merge(adapter, str(base), out)
    assert before is None or sorted(out.parent.iterdir()) == before
    return str(caught.value)
