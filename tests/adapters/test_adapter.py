"""Read adapter folders of stock PEFT, of other tools and of other versions: they mean what PEFT
computes with them, or are refused where two meanings fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.read.adapter import read_adapter
from megalora.tiny import make_tiny
from tests.adapters.adapters import (
    ATTENTION,
    EXPERTS,
    Trained,
    logits,
    train,
)
from tests.adapters.folders import edit_tensors
from tests.adapters.stock import new_adapter, read_logits, refusal, shape_of
from tests.named_tensors import assert_same_tensors, renamed
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

# Experts as PEFT's target_parameters adapts them: gate and up as one weight.
FUSED = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
BY_STOCK_PEFT: list[tuple[str, dict[str, Any]]] = [
    (
        "moe",
        # A name and an expression; PEFT matches both against the end of a module's name.
        {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 3, r"layers\.2\..*v_proj": 7}},
    ),
    ("moe", {"target_modules": ["gate", "o_proj", "lm_head"], "alpha_pattern": {"o_proj": 5}}),
    ("moe", {"target_modules": ["k_proj", "v_proj"], "layers_to_transform": [1, 3]}),
    # A scale of alpha / sqrt(r), and a string, which is an expression for the whole name.
    ("dense", {"target_modules": "all-linear", "use_rslora": True}),
    ("dense", {"target_modules": r".*\.[02]\.mlp\.(gate|down)_proj"}),
    # PEFT turns targets of experts into parameters; rank and alpha of gate_up are twice r and
    # lora_alpha then.
    ("moe", {"target_modules": [*EXPERTS, "q_proj"]}),
    ("moe", {"target_modules": "all-linear"}),
    # Parameters instead of modules, in both orders and one alone: PEFT's wrappers nest by order.
    ("moe", FUSED),
    ("moe", FUSED | {"target_parameters": FUSED["target_parameters"][::-1]}),
    ("moe", FUSED | {"target_parameters": FUSED["target_parameters"][:1]}),
    ("moe", FUSED | {"target_parameters": FUSED["target_parameters"][1:]}),
    (
        "moe",
        FUSED
        | {
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"experts.down_proj": 5},
            "use_rslora": True,
        },
    ),
    # Experts in some layers, a dense MLP of the same names in another.
    ("mixed", {"target_modules": EXPERTS}),
]


@pytest.mark.parametrize(("base", "options"), BY_STOCK_PEFT)
def test_an_adapter_made_by_stock_peft(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    stock = new_adapter(bases[base], **options)
    stock.save_pretrained(tmp_path, save_embedding_layers=False)
    _, found = read_logits(tmp_path, bases[base])
    # float32 through 4 layers errs by some 2^-24 * 100 of the largest logit, which is about 3.
    torch.testing.assert_close(found, logits(stock), rtol=0, atol=2e-5)


PARAMETERS = {"base_layer": "mlp.experts.gate_up_proj", "": "mlp.experts.down_proj"}
"""Part of a tensor's name -> the parameter whose wrapper PEFT calls so, the inner one first."""


class Stacked:
    """Known factors of one layer's experts, and the ways in which tools have written them."""

    def __init__(self, base: Path, rank: int = 3) -> None:
        self.base = base
        self.shape = shape_of(base)
        self.rank = rank
        e = self.shape.num_experts
        h = self.shape.hidden
        i = self.shape.expert_intermediate
        generator = torch.Generator().manual_seed(3)

        def draw(*sizes: int) -> Tensor:
            return 0.1 * torch.randn(*sizes, generator=generator)

        # A [experts, rank, in] and B [experts, out, rank] of each parameter.
        self.factors = {
            "base_layer": (draw(e, rank, h), draw(e, 2 * i, rank)),
            "": (draw(e, rank, i), draw(e, h, rank)),
        }  # fmt: skip

    def deltas(self, parts: tuple[str, ...] = ("base_layer", "")) -> dict[str, Tensor]:
        """HF module -> change of its weight at scale 2."""
        found = {}
        for part in parts:
            names = ("gate_proj", "up_proj") if part else ("down_proj",)
            a_Eri, b_Eor = self.factors[part]
            # [experts, out, in]; the fused weight has gate's rows above up's.
            delta_Eoi = 2.0 * b_Eor @ a_Eri
            for e, delta in enumerate(delta_Eoi):
                for name, rows in zip(names, delta.chunk(len(names)), strict=True):
                    found[f"model.layers.1.mlp.experts.{e}.{name}"] = rows
        return found

    def write(self, folder: Path, *, old: bool, grouped: bool = False,
              parts: tuple[str, ...] = ("base_layer", ""),
              **config: Any) -> Path:  # fmt: skip
        """``old``: with input and output exchanged; ``grouped``: an expert's columns of B together.
        Written index by index."""
        tensors = {}
        for part in parts:
            a_Eri, b_Eor = self.factors[part]
            if old:
                # PEFT before 0.19.1 adapted the transposed weight: (B A)^T = A^T B^T.
                a_Eri, b_Eor = b_Eor.transpose(1, 2), a_Eri.transpose(1, 2)
            e, r, _ = a_Eri.shape
            a = torch.empty(e * r, a_Eri.shape[2])
            b = torch.empty(b_Eor.shape[1], e * r)
            for expert in range(e):
                for rank in range(r):
                    # Rows of A are grouped by expert, whatever the columns of B are.
                    a[expert * r + rank] = a_Eri[expert, rank]
                    column = expert * r + rank if grouped else rank * e + expert
                    b[:, column] = b_Eor[expert, :, rank]
            where = "base_model.model.model.layers.1.mlp.experts"
            # PEFT wraps a module once per parameter: the first wrapper is the second's base layer.
            if part and len(parts) > 1:
                where += f".{part}"
            tensors |= {f"{where}.lora_A.weight": a, f"{where}.lora_B.weight": b}
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / WEIGHTS)
        written = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "target_modules": None,
            "target_parameters": [PARAMETERS[part] for part in parts],
        }
        (folder / CONFIG).write_text(json.dumps(written | config))
        return folder

    def check(
        self, folder: Path, order: Any = None, parts: tuple[str, ...] = ("base_layer", "")
    ) -> None:
        """Compare what is read of the folder with ``deltas``, expert by expert."""
        read = read_adapter(folder, self.shape, order)
        found = Trained(self.base, self.shape, read.adapted, read.tensors, folder)
        expected = self.deltas(parts)
        for a, expert, delta in found.deltas():
            torch.testing.assert_close(
                delta, expected.pop(a.hf_module(expert)), rtol=1e-6, atol=1e-7
            )
        assert not expected


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases in which one of the two parameters is square: 96 = 2 * 48, and 96 = 96."""
    folder = tmp_path_factory.mktemp("square")
    return {
        "base_layer": make_tiny(folder / "gate_up", moe_intermediate_size=48, num_hidden_layers=2),
        "": make_tiny(folder / "down", moe_intermediate_size=96, num_hidden_layers=2),
    }


@pytest.mark.parametrize("parts", [("base_layer", ""), ("base_layer",), ("",)])
@pytest.mark.parametrize("old", [False, True])
def test_stacked_orientations_are_told_apart_by_shape(
    bases, tmp_path: Path, old: bool, parts: tuple[str, ...]
) -> None:
    stacked = Stacked(bases["moe"])
    stacked.check(stacked.write(tmp_path, old=old, parts=parts), parts=parts)


@pytest.mark.parametrize("part", ["base_layer", ""])
@pytest.mark.parametrize("old", [False, True])
def test_a_square_parameter_is_read_as_its_sibling_or_its_version_says(
    square: dict[str, Path], tmp_path: Path, part: str, old: bool
) -> None:
    stacked = Stacked(square[part])
    stacked.check(stacked.write(tmp_path / "both", old=old))
    # PEFT 0.19.1 exchanged input and output; of one alone only its version tells.
    version = {"peft_version": "0.19.0" if old else "0.19.1"}
    stacked.check(
        stacked.write(tmp_path / "alone", old=old, parts=(part,), **version), parts=(part,)
    )
    stacked.write(tmp_path / "unknown", old=old, parts=(part,))
    assert "have as many rows as columns" in refusal(tmp_path / "unknown", square[part])


def test_columns_grouped_by_expert(bases: dict[str, Path], tmp_path: Path) -> None:
    """Unsloth before 2026.9.6: the same shapes, other numbers."""
    stacked = Stacked(bases["moe"])
    # Unsloth's own key of the config.
    stacked.check(
        stacked.write(tmp_path, old=False, grouped=True, lora_B_layout="grouped_by_expert")
    )
    # PEFT drops keys that it does not know as it loads a config; auto_mapping survives that.
    stacked.check(
        stacked.write(
            tmp_path, old=True, grouped=True, auto_mapping={"lora_B_layout": "grouped_by_expert"}
        )
    )
    stacked.check(
        stacked.write(
            tmp_path, old=False, lora_B_layout="rank_major", auto_mapping={"unsloth_fixed": True}
        )
    )
    # Neither a layout nor a version that settles it: both readings have these shapes.
    stacked.write(tmp_path, old=False, grouped=True, auto_mapping={"unsloth_fixed": True})
    assert (
        "Say which, to megalora import: --lora-b-layout grouped_by_expert or rank_major"
        in refusal(tmp_path, bases["moe"])
    )
    stacked.check(tmp_path, order="grouped_by_expert")
    # The other reading gives other numbers, so the right one was not chance.
    with pytest.raises(AssertionError):
        stacked.check(tmp_path, order="rank_major")


@pytest.mark.parametrize(
    "rename",
    [
        # PEFT's inner model saved by itself, and marks that wrappers leave in a state_dict's names.
        lambda name: name.removeprefix("base_model.model."),
        lambda name: "module." + name,
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.").replace(
            ".mlp", "._fsdp_wrapped_module.mlp"
        ),
        lambda name: name.replace("base_model.model.model.", "base_model.model._orig_mod.model."),
    ],
    ids=["no prefix", "ddp", "adapter name", "fsdp and checkpointing", "compiled"],
)
def test_names_of_other_stacks(bases: dict[str, Path], tmp_path: Path, rename: Any) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj", *EXPERTS])
    before = read_adapter(trained.folder, trained.shape)
    names = load_file(trained.folder / WEIGHTS).keys()
    edit_tensors(trained.folder, renamed(rename))
    # A renaming that matched nothing would prove nothing.
    assert load_file(trained.folder / WEIGHTS).keys() != names
    after = read_adapter(trained.folder, trained.shape)
    assert after.adapted == before.adapted
    assert_same_tensors(after.tensors, before.tensors)


def test_a_lost_parameter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    stacked = Stacked(bases["moe"])
    # The config names both parameters; the file has one.
    stacked.write(tmp_path, old=False, parts=("",), target_parameters=FUSED["target_parameters"])
    assert "has no tensors for mlp.experts.gate_up_proj, which its config targets" in refusal(
        tmp_path, bases["moe"]
    )


def test_two_stacked_tensors_of_one_name_are_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    Stacked(bases["moe"]).write(tmp_path, old=False)
    # As of a second adapter that was saved into the same file.
    again = "base_model.model.model.layers.1.mlp.experts.lora_A.other.weight"
    edit_tensors(tmp_path, lambda tensors: tensors | {again: tensors[again.replace(".other", "")]})
    assert "are lora_A of the same experts" in refusal(tmp_path, bases["moe"])
