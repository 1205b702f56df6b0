"""Read experts as stacks other than PEFT write them: 3-D tensors and fused gate and up give the
very deltas, and what fits no reading is refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.export import export
from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.inspect import describe
from megalora.adapters.read.adapter import read_adapter
from megalora.config import LoRAConfig
from megalora.lora.select import resolve
from megalora.lora.spec import tensor_name
from megalora.model.shape import ModelShape
from megalora.serve.check import check_adapter
from megalora.serve.errors import AdapterInvalid
from tests.adapters.adapters import EXPERTS, Trained, train
from tests.adapters.stock import check_equal, loaded_by_peft, shape_of
from tests.named_tensors import assert_same_tensors

RANK = 3
LAYER = 1
MLP = f"base_model.model.model.layers.{LAYER}.mlp"
W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""Projection -> Tinker's and vLLM's name of it."""


class Factors:
    """Known factors of one layer's experts."""

    def __init__(self, shape: ModelShape, shared: bool = False) -> None:
        """``shared``: experts share A of gate and up and B of down, as Tinker trains them and
        SGLang loads them."""
        e = shape.num_experts
        h = shape.hidden
        i = shape.expert_intermediate
        generator = torch.Generator().manual_seed(3)

        def draw(*sizes: int) -> Tensor:
            return 0.1 * torch.randn(*sizes, generator=generator)

        # Shared is what touches the hidden state: A of gate and up, B of down.
        outer = 1 if shared else e
        self.of: dict[str, tuple[Tensor, Tensor]] = {
            "gate_proj": (draw(outer, RANK, h), draw(e, i, RANK)),
            "up_proj": (draw(outer, RANK, h), draw(e, i, RANK)),
            "down_proj": (draw(e, RANK, i), draw(outer, h, RANK)),
        }

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """HF module -> change of its weight, one expert at a time."""
        for name, (a, b) in self.of.items():
            for expert in range(max(len(a), len(b))):
                # A shared factor has length 1: every expert's index modulo 1 is 0. The scale is
                # alpha / r = 2 throughout.
                delta = 2.0 * b[expert % len(b)] @ a[expert % len(a)]
                yield f"model.layers.{LAYER}.mlp.experts.{expert}.{name}", delta


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Write an adapter folder of rank 3 and alpha 6, but for what ``config`` says otherwise."""
    folder.mkdir(exist_ok=True)
    # safetensors refuses views, such as transposed tensors.
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS)
    written = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": "all-linear",
    }
    (folder / CONFIG).write_text(json.dumps(written | config))
    return folder


def check(folder: Path, base: Path, factors: Factors) -> None:
    """What is read of the folder has the deltas of ``factors``, and no others."""
    read = read_adapter(folder, shape_of(base))
    expected = dict(factors.deltas())
    found = Trained(base, shape_of(base), read.adapted, read.tensors, folder)
    for a, expert, delta in found.deltas():
        torch.testing.assert_close(delta, expected.pop(a.hf_module(expert)), rtol=1e-6, atol=1e-7)
    assert not expected


def in_3d(pairs: dict[str, tuple[Tensor, Tensor]], transposed: bool) -> dict[str, Tensor]:
    """A and B of all experts as two tensors for each projection; ``transposed``: each expert's
    matrix is written as [in, out]."""
    tensors = {}
    for name, pair in pairs.items():
        for factor, tensor in zip("AB", pair, strict=True):
            if transposed:
                tensor = tensor.transpose(1, 2)
            tensors[f"{MLP}.experts.{name}.lora_{factor}.weight"] = tensor
    return tensors


@pytest.mark.parametrize("shared", [False, True], ids=["per expert", "shared outer"])
@pytest.mark.parametrize("names", [W, dict(zip(W, W, strict=True))], ids=["Tinker", "SGLang"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out first", "in first"])
def test_3d_tensors(
    bases: dict[str, Path], tmp_path: Path, shared: bool, names: dict[str, str], transposed: bool
) -> None:
    factors = Factors(shape_of(bases["moe"]), shared)
    pairs = {}
    for name, pair in factors.of.items():
        pairs[names[name]] = pair
    tensors = in_3d(pairs, transposed)
    # However PEFT's config spells what is adapted.
    check(write(tmp_path / "a", tensors), bases["moe"], factors)
    check(write(tmp_path / "b", tensors, target_modules=[*names.values()]), bases["moe"], factors)
    check(write(tmp_path / "c", tensors, target_modules=["experts"]), bases["moe"], factors)
    text = describe(tmp_path / "a")
    assert "3-D factors of all experts of a layer, which import, merge and export read: " in text


def test_what_export_writes_for_sglang_is_read_back(bases: dict[str, Path], tmp_path: Path) -> None:
    """Its own 3-D layout, value for value."""
    shape = shape_of(bases["moe"])
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=RANK, alpha=6.0, target_modules=EXPERTS
    )
    factors = load_file(trained.folder / WEIGHTS)
    for a in resolve(LoRAConfig(rank=RANK, alpha=6.0, target_modules=EXPERTS), shape):
        # Every expert gets the first one's, for SGLang's layout stores one for all.
        one = "B" if a.name == "down_proj" else "A"
        first = factors[tensor_name(a.hf_module(0), one)]
        for module in a.hf_modules():
            factors[tensor_name(module, one)] = first.clone()
    save_file(factors, trained.folder / WEIGHTS)
    export(
        trained.folder,
        tmp_path / "out",
        engine="sglang",
        layout="shared_outer",
        base=str(bases["moe"]),
    )
    # Three of a layer's six tensors are shared: A of gate and up, B of down.
    num_shared = 0
    for tensor in load_file(tmp_path / "out" / WEIGHTS).values():
        assert tensor.dim() == 3
        num_shared += len(tensor) == 1
    assert num_shared == 3 * shape.num_layers
    again = read_adapter(tmp_path / "out", shape)
    assert_same_tensors(again.tensors, factors)


def fused(factors: Factors) -> tuple[Tensor, Tensor]:
    """gate's and up's as one adapter of the fused weight: A's above each other, B
    block-diagonal."""
    gate_a, gate_b = factors.of["gate_proj"]
    up_a, up_b = factors.of["up_proj"]
    zeros = torch.zeros_like(gate_b)
    # [experts, 2 r, hidden]
    a = torch.cat([gate_a, up_a], 1)
    # [experts, 2 intermediate, 2 r]: gate's rows use the first r of A's, up's the others.
    gate_rows = torch.cat([gate_b, zeros], 2)
    up_rows = torch.cat([zeros, up_b], 2)
    return a, torch.cat([gate_rows, up_rows], 1)


@pytest.mark.parametrize("transposed", [False, True], ids=["out first", "in first"])
def test_a_3d_tensor_of_gate_and_up(
    bases: dict[str, Path], tmp_path: Path, transposed: bool
) -> None:
    factors = Factors(shape_of(bases["moe"]))
    pairs = {"gate_up_proj": fused(factors), "down_proj": factors.of["down_proj"]}
    tensors = in_3d(pairs, transposed)
    # The fused adapter has both ranks; twice alpha keeps its scale.
    patterns = {
        "rank_pattern": {"gate_up_proj": 2 * RANK},
        "alpha_pattern": {"gate_up_proj": 4 * RANK},
    }
    config = {
        "target_modules": None,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    check(write(tmp_path, tensors, **patterns, **config), bases["moe"], factors)


def test_gate_and_up_of_each_expert_in_one(bases: dict[str, Path], tmp_path: Path) -> None:
    """They share an A; B's rows are gate's, then up's."""
    factors = Factors(shape_of(bases["moe"]))
    gate_a, gate_b = factors.of["gate_proj"]
    _, up_b = factors.of["up_proj"]
    factors.of["up_proj"] = (gate_a, up_b)
    tensors: dict[str, Tensor] = {}
    for e in range(len(gate_a)):
        stem = f"{MLP}.experts.{e}"
        tensors[f"{stem}.gate_up_proj.lora_A.weight"] = gate_a[e]
        tensors[f"{stem}.gate_up_proj.lora_B.weight"] = torch.cat([gate_b[e], up_b[e]])
        for factor, tensor in zip("AB", factors.of["down_proj"], strict=True):
            tensors[f"{stem}.down_proj.lora_{factor}.weight"] = tensor[e]
    check(
        write(tmp_path, tensors, target_modules=["gate_up_proj", "down_proj"]),
        bases["moe"],
        factors,
    )


def test_gate_and_up_of_a_dense_mlp_in_one(bases: dict[str, Path], tmp_path: Path) -> None:
    shape = shape_of(bases["dense"])
    a = 0.1 * torch.randn(RANK, shape.hidden)
    # gate's rows, then up's.
    b = 0.1 * torch.randn(2 * shape.intermediate, RANK)
    stem = "base_model.model.model.layers.2.mlp.gate_up_proj"
    folder = write(
        tmp_path,
        {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b},
        target_modules=["gate_up_proj"],
    )
    read = read_adapter(folder, shape)
    assert [adapted.name for adapted in read.adapted] == ["gate_proj", "up_proj"]
    found = Trained(bases["dense"], shape, read.adapted, read.tensors, folder)
    (_, _, gate), (_, _, up) = found.deltas()
    torch.testing.assert_close(torch.cat([gate, up]), 2 * b @ a)


def test_tinker_s_head(bases: dict[str, Path], tmp_path: Path) -> None:
    """``unembed_tokens`` is lm_head, and part of Tinker's all-linear, though not of PEFT's."""
    shape = shape_of(bases["moe"])
    a = 0.1 * torch.randn(RANK, shape.hidden)
    b = 0.1 * torch.randn(shape.vocab, RANK)
    stem = "base_model.model.model.unembed_tokens"
    write(tmp_path, {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b})
    read = read_adapter(tmp_path, shape)
    assert [adapted.name for adapted in read.adapted] == ["lm_head"]
    # The same factors under the names of PEFT, which computes what is expected.
    written = train(
        bases["moe"], tmp_path / "peft", rank=RANK, alpha=6.0, target_modules=["lm_head"]
    )
    save_file(read.tensors, written.folder / WEIGHTS)
    check_equal(tmp_path, bases["moe"], loaded_by_peft(written.folder, bases["moe"]))


# Experts, hidden and expert intermediate size of the tiny MoE.
E = 8
H = 96
I = 80
# Shapes by name below ``model.layers.1.mlp``, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    # Half of the experts: some ranks' files only, or another base.
    "another number of experts": (
        {"experts.w1.lora_A": (4, RANK, H), "experts.w1.lora_B": (4, I, RANK)},
        "for E = 8 experts or 1",
    ),
    "another width": (
        {"experts.w1.lora_A": (E, RANK, 64), "experts.w1.lora_B": (E, I, RANK)},
        r"reads A \[E, r, 96\] and B",
    ),
    "ranks apart": (
        {"experts.w2.lora_A": (E, RANK, I), "experts.w2.lora_B": (E, H, 2)},
        r"reads A \[E, r, 80\] and B \[E, 96, r\]",
    ),
    "a B alone": ({"experts.w3.lora_B": (E, I, RANK)}, "experts.w3.lora_B.weight has no partner"),
    "another rank than the config's": (
        {"experts.w1.lora_A": (E, 2, H), "experts.w1.lora_B": (E, I, 2)},
        "has rank 2, but adapter_",
    ),
    # One matrix: of which expert it is, or that all of them share it, nothing says.
    "2-D under a 3-D name": (
        {"experts.w1.lora_A": (RANK, H), "experts.w1.lora_B": (I, RANK)},
        "of this name is 3-D .* Write an A and",
    ),
    "3-D under a 2-D name": (
        {"experts.lora_A": (E, RANK, I), "experts.lora_B": (E, H, RANK)},
        "a factor is a matrix in",
    ),
    # vLLM's fused parameter, which has no adapter of its own.
    "unknown to anyone": (
        {"experts.w13.lora_A": (E, RANK, H), "experts.w13.lora_B": (E, I, RANK)},
        "a factor is a matrix in",
    ),
    # q, k and v one after the other, or interleaved by query group as in Megatron.
    "query, key and value in one": (
        {"../self_attn.qkv_proj.lora_A": (RANK, H), "../self_attn.qkv_proj.lora_B": (320, RANK)},
        "qkv_proj is another stack's name for q_proj, k_proj, v_proj, and the order of its rows",
    ),
    "Megatron's first linear": (
        {"linear_fc1.lora_A": (RANK, H), "linear_fc1.lora_B": (160, RANK)},
        "linear_fc1 is another stack's name for gate_proj, up_proj",
    ),
    # A fused A is gate's and up's A at once, and up has another.
    "fused and apart": (
        {
            "experts.0.gate_up_proj.lora_A": (RANK, H),
            "experts.0.gate_up_proj.lora_B": (2 * I, RANK),
            "experts.0.up_proj.lora_A": (RANK, H),
        },
        "two tensors are lora_A of model.layers.1.mlp.experts.0.up_proj",
    ),
    # An odd number of rows has no two halves; gate would get one more than it has.
    "fused, of another size": (
        {
            "experts.0.gate_up_proj.lora_A": (RANK, H),
            "experts.0.gate_up_proj.lora_B": (2 * I + 1, RANK),
        },
        r"experts.0.gate_proj.lora_B.weight is \(81, 3\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_reading_fits_is_refused(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    sizes, message = REFUSED[case]
    tensors = {}
    for name, size in sizes.items():
        # "../" leaves the MLP for the layer.
        full_name = f"{MLP}.{name}.weight".replace("mlp.../", "")
        tensors[full_name] = torch.ones(size)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(write(tmp_path, tensors), shape_of(bases["moe"]))
    assert "\n" not in str(caught.value)


def test_a_server_takes_no_3d_tensors(tmp_path: Path) -> None:
    tensors = {
        f"{MLP}.experts.w1.lora_A.weight": torch.ones(1, RANK, H),
        f"{MLP}.experts.w1.lora_B.weight": torch.ones(E, I, RANK),
    }
    write(tmp_path, tensors)
    with pytest.raises(
        AdapterInvalid,
        match="one tensor for all experts; vLLM takes one A and B per expert .* megalora export",
    ):
        check_adapter(tmp_path)
