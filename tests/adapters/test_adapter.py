"""Reading adapter folders: what stock PEFT wrote means what PEFT computes with it, and what cannot
be meant is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.files import CONFIG, WEIGHTS, read_config
from megalora.adapters.read.adapter import read_adapter
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.tiny import make_tiny
from tests.adapters.adapters import (
    ATTENTION,
    EXPERTS,
    Trained,
    load_base,
    logits,
    merged_by_hand,
    train,
)

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("User", "Runtime")]


FUSED = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
BY_STOCK_PEFT: list[tuple[str, dict[str, Any]]] = [
    (
        "moe",
        {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 3, r"layers\.2\..*v_proj": 7}},
    ),
    ("moe", {"target_modules": ["gate", "o_proj", "lm_head"], "alpha_pattern": {"o_proj": 5}}),
    ("moe", {"target_modules": ["k_proj", "v_proj"], "layers_to_transform": [1, 3]}),
    ("dense", {"target_modules": "all-linear", "use_rslora": True}),
    ("dense", {"target_modules": r".*\.[02]\.mlp\.(gate|down)_proj"}),
    # converted: rank and alpha of gate_up are twice r and lora_alpha
    ("moe", {"target_modules": [*EXPERTS, "q_proj"]}),
    ("moe", {"target_modules": "all-linear"}),
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
    ("mixed", {"target_modules": EXPERTS}),
]


def stock_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """Stock PEFT's model with random B, saved to ``folder``."""
    stock = get_peft_model(
        load_base(base),
        LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options}),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    stock.save_pretrained(folder, save_embedding_layers=False)
    return stock.eval()


def shape_of(base: Path) -> ModelShape:
    return model_shape(read_hf_config(base))


def merged(folder: Path, base: Path, order: Any = None) -> Tensor:
    """Logits of what we read."""
    read = read_adapter(folder, shape_of(base), order)
    return logits(merged_by_hand(Trained(base, shape_of(base), read.adapted, read.tensors, folder)))


@pytest.mark.parametrize(("base", "options"), BY_STOCK_PEFT)
def test_an_adapter_made_by_stock_peft(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    stock = stock_adapter(bases[base], tmp_path, **options)
    torch.testing.assert_close(merged(tmp_path, bases[base]), logits(stock), rtol=0, atol=2e-5)


class Stacked:
    """Labelled factors of one layer's experts, and the ways in which they have been written."""

    def __init__(self, base: Path, rank: int = 3) -> None:
        self.base, self.shape, self.rank = base, shape_of(base), rank
        e = self.shape.num_experts
        h = self.shape.hidden
        i = self.shape.expert_intermediate
        generator = torch.Generator().manual_seed(3)
        draw = lambda *sizes: 0.1 * torch.randn(*sizes, generator=generator)  # noqa: E731
        self.factors = {
            "base_layer": (draw(e, rank, h), draw(e, 2 * i, rank)),
            "": (draw(e, rank, i), draw(e, h, rank)),
        }  # fmt: skip

    def deltas(self, parts: tuple[str, ...] = ("base_layer", "")) -> dict[str, Tensor]:
        """HF module -> change of its weight at scale 2."""
        found = {}
        for part in parts:
            for e, delta in enumerate(
                2.0 * b @ a for a, b in zip(*self.factors[part], strict=True)
            ):
                names = ("gate_proj", "up_proj") if part else ("down_proj",)
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
                a_Eri, b_Eor = b_Eor.transpose(1, 2), a_Eri.transpose(1, 2)
            e, r, _ = a_Eri.shape
            a = torch.empty(e * r, a_Eri.shape[2])
            b = torch.empty(b_Eor.shape[1], e * r)
            for expert in range(e):
                for rank in range(r):
                    a[expert * r + rank] = a_Eri[expert, rank]
                    b[:, expert * r + rank if grouped else rank * e + expert] = b_Eor[
                        expert, :, rank
                    ]
            where = "base_model.model.model.layers.1.mlp.experts" + (
                f".{part}" if part and len(parts) > 1 else ""
            )
            tensors |= {f"{where}.lora_A.weight": a, f"{where}.lora_B.weight": b}
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / WEIGHTS)
        written = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "target_modules": None,
            "target_parameters": [
                f"mlp.experts.{'gate_up' if part else 'down'}_proj" for part in parts
            ],
        }
        (folder / CONFIG).write_text(json.dumps(written | config))
        return folder

    def check(
        self, folder: Path, order: Any = None, parts: tuple[str, ...] = ("base_layer", "")
    ) -> None:
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
    version = {"peft_version": "0.19.0" if old else "0.19.1"}
    stacked.check(
        stacked.write(tmp_path / "alone", old=old, parts=(part,), **version), parts=(part,)
    )
    stacked.write(tmp_path / "unknown", old=old, parts=(part,))
    assert "have as many rows as columns" in refusal(tmp_path / "unknown", square[part])


def test_columns_grouped_by_expert(bases: dict[str, Path], tmp_path: Path) -> None:
    """Unsloth before 2026.9.6: the same shapes, other numbers."""
    stacked = Stacked(bases["moe"])
    stacked.check(
        stacked.write(tmp_path, old=False, grouped=True, lora_B_layout="grouped_by_expert")
    )
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
    stacked.write(tmp_path, old=False, grouped=True, auto_mapping={"unsloth_fixed": True})
    assert (
        "Say which, to megalora import: --lora-b-layout grouped_by_expert or rank_major"
        in refusal(tmp_path, bases["moe"])
    )
    stacked.check(tmp_path, order="grouped_by_expert")
    with pytest.raises(AssertionError):
        stacked.check(tmp_path, order="rank_major")


@pytest.mark.parametrize(
    "rename",
    [
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
    tensors = load_file(trained.folder / WEIGHTS)
    renamed = {rename(name): t for name, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, trained.folder / WEIGHTS)
    after = read_adapter(trained.folder, trained.shape)
    assert after.adapted == before.adapted and after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[name], t) for name, t in before.tensors.items())


def test_a_lost_parameter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    stacked = Stacked(bases["moe"])
    stacked.write(tmp_path, old=False, parts=("",), target_parameters=FUSED["target_parameters"])
    assert "has no tensors for mlp.experts.gate_up_proj, which its config targets" in refusal(
        tmp_path, bases["moe"]
    )


def test_two_stacked_tensors_of_one_name_are_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    Stacked(bases["moe"]).write(tmp_path, old=False)
    again = "base_model.model.model.layers.1.mlp.experts.lora_A.other.weight"
    change(tmp_path, **{again: load_file(tmp_path / WEIGHTS)[again.replace(".other", "")].clone()})
    assert "are lora_A of the same experts" in refusal(tmp_path, bases["moe"])


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0, 1]},
        {"exclude_modules": ["layers.2.self_attn.q_proj"]},
        {"exclude_modules": r".*\.3\..*"},
        {"target_modules": r".*\.[01]\..*q_proj"},
    ],
)
def test_what_peft_would_leave_out_is_refused(
    bases: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    config = trained.folder / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    assert "PEFT would ignore them" in refusal(trained.folder, trained.base)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"alpha_pattern": {"q_proj": None}},
            "alpha_pattern must be names and numbers above 0, got {'q_proj': None}",
        ),
        ({"rank_pattern": [3]}, "rank_pattern must be names and ranks of at least 1, got [3]"),
        ({"rank_pattern": {"*q": 2}}, "is neither a name nor a regular expression ("),
        (
            {"target_modules": "*q_proj"},
            "'*q_proj' is neither a name nor a regular expression (nothing to repeat)",
        ),
        ({"target_modules": 5}, "target_modules must be a name, or a list of names, got 5"),
        ({"auto_mapping": []}, "auto_mapping must be an object, got []"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({"r": 0}, "r=0 and lora_alpha=32 must be a rank of at least 1 and a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a rank of at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_values_refused(
    bases: dict[str, Path], tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    config = trained.folder / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | option))
    assert (said := refusal(trained.folder, trained.base)).startswith(
        str(config)
    ) and message in said


def test_experts_that_are_not_there_are_zeros_and_named(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=2, target_modules=["down_proj"], layers=[1]
    )
    change(trained.folder, remove="experts.5.down_proj")
    read = read_adapter(trained.folder, trained.shape)
    assert read.absent == ["model.layers.1.mlp.experts.5.down_proj"]
    missing = {name: t for name, t in read.tensors.items() if "experts.5.down_proj" in name}
    assert len(missing) == 2 and not any(t.any() for t in missing.values())


def refusal(adapter: Path, base: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_adapter(adapter, shape_of(base))
    return str(caught.value)


def change(adapter: Path, remove: str = "", **add: Tensor) -> None:
    tensors = {
        name: t
        for name, t in load_file(adapter / WEIGHTS).items()
        if not remove or remove not in name
    }
    save_file(tensors | add, adapter / WEIGHTS)


def test_a_missing_tensor_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2)
    change(trained.folder, remove="experts.3.up_proj.lora_B")
    assert (
        refusal(trained.folder, trained.base)
        == f"{trained.folder}/adapter_model.safetensors has lora_A of"
        " model.layers.0.mlp.experts.3.up_proj and lacks its lora_B"
    )


def test_a_tensor_without_target_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    change(trained.folder, **{"base_model.model.lm_head.lora_A.weight": torch.ones(2, 96)})
    assert (
        refusal(trained.folder, trained.base)
        == f"{trained.folder}/adapter_model.safetensors has, but its config does not target, 1"
        " modules, such as lm_head: PEFT would ignore them. Add them to target_modules in"
        f" {trained.folder}/adapter_config.json"
    )


def test_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    wider = make_tiny(tmp_path / "wider", hidden_size=100)
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["k_proj"])
    assert (
        refusal(trained.folder, wider) == f"{trained.folder}/adapter_model.safetensors:"
        " base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight is (2, 96), but this"
        " base model and rank need (2, 100)"
    )
    router = train(bases["moe"], tmp_path / "router", rank=2, target_modules=["gate", "k_proj"])
    assert (
        refusal(router.folder, bases["dense"])
        == f"{router.folder}/adapter_model.safetensors: model.layers.0.mlp.gate is not a linear"
        " layer of this base model; the nearest is model.layers.0.mlp.gate_proj"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{folder} is not an adapter folder: it has no adapter_config.json"),
        (
            '{"peft_type": "LORA"',
            "{folder}/adapter_config.json:1: not valid JSON (Expecting ',' delimiter, column 21)",
        ),
        ('{"r": 2}', "{folder}/adapter_config.json: peft_type is None; megalora reads LORA only"),
        (
            '{"peft_type": "LOHA"}',
            "{folder}/adapter_config.json: peft_type is 'LOHA'; megalora reads LORA only",
        ),
        (
            '{"peft_type": "LORA", "r": 2}',
            "{folder}/adapter_config.json: lora_alpha must be a number, got None",
        ),
        (
            '{"peft_type": "LORA", "r": "2", "lora_alpha": 4}',
            "{folder}/adapter_config.json: r must be a number, got '2'",
        ),
    ],
)
def test_config_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / CONFIG).write_text(content)
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == message.format(folder=tmp_path)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 2]]},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [3]},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_is_not_plain_lora_is_refused(
    bases: dict[str, Path], tmp_path: Path, option: dict[str, Any]
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    config = trained.folder / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | option))
    assert refusal(trained.folder, trained.base).startswith(f"{config}: {next(iter(option))}=")


def test_a_rank_the_config_does_not_say_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """As verl writes it: the scale would be wrong."""
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    config = trained.folder / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 4}))
    assert refusal(trained.folder, trained.base) == (
        f"{trained.folder}/adapter_model.safetensors:"
        " base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight has rank 2, but"
        " adapter_config.json says 4 (scales follow from it)"
    ).replace("k_proj", "q_proj")


def test_experts_of_different_rank_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=2, target_modules=["down_proj"], layers=[1]
    )
    config = trained.folder / CONFIG
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"rank_pattern": {r"experts\.3\.down_proj": 1}})
    )
    name = "base_model.model.model.layers.1.mlp.experts.3.down_proj.lora_{}.weight"
    tensors = load_file(trained.folder / WEIGHTS)
    narrow = {
        name.format("A"): tensors[name.format("A")][:1],
        name.format("B"): tensors[name.format("B")][:, :1],
    }
    change(trained.folder, **{n: t.contiguous() for n, t in narrow.items()})
    assert "experts of layer 1 have different ranks or scales in down_proj ([1, 2];" in refusal(
        trained.folder, trained.base
    )


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (
            {"base_model.model.lm_head.lora_magnitude_vector": torch.ones(4, 4)},
            "lora_magnitude_vector is no LoRA factor of a",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)},
            "lora_embedding_A is no LoRA factor of a",
        ),
        (
            {"base_model.model.model.layers.0.mlp.experts.w1.lora_A.weight": torch.ones(8, 2, 96)},
            "w1.lora_A.weight has no partner",
        ),
        (
            {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(
                    2, 96, 1
                )
            },
            "a factor is a matrix in F64",
        ),
        (
            {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.full(
                    (2, 96), float("nan")
                )
            },
            "has NaN or infinite",
        ),
        (
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 96)},
            "two tensors are lora_A of model.layers.0.self_attn.q_proj",
        ),
        (
            {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 96)},
            "model.layers.9.self_attn.q_proj is not a linear",
        ),
        (
            {"base_model.model.model.layers.1.mlp.experts.lora_A.weight": torch.ones(16, 80)},
            "has no partner (lora_A and lora_B)",
        ),
    ],
)
def test_tensors_refused(
    bases: dict[str, Path], tmp_path: Path, add: dict[str, Tensor], message: str
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    change(trained.folder, **add)
    assert message in refusal(trained.folder, trained.base)


def test_an_empty_file_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    change(trained.folder, remove="lora")
    assert (
        refusal(trained.folder, trained.base)
        == f"{trained.folder}/adapter_model.safetensors holds no tensors: nothing was adapted, or"
        " saving went wrong"
    )


def test_a_target_without_tensors_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj", *EXPERTS])
    change(trained.folder, remove="experts")
    assert "has no tensors for down_proj, which its config targets: they were lost" in refusal(
        trained.folder, trained.base
    )
