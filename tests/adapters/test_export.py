"""Exports for one engine: what it reads, what it would drop, and the card; export after import is
the same file, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.export import export
from megalora.adapters.files import (
    CARD,
    CONFIG,
    LORA_SECTION,
    OPTIMIZER,
    PROBE,
    STATE_JSON,
    WEIGHTS,
    read_config,
)
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.resumable import import_adapter
from megalora.adapters.trained import trained_form
from megalora.config import LoRAConfig
from megalora.config.file import load_config
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted, tensor_name
from tests.adapters.adapters import (
    ATTENTION,
    CASES,
    EXPERTS,
    train,
)
from tests.adapters.folders import factors_of, remove_tensors
from tests.adapters.stock import loaded_by_peft, read_logits
from tests.named_tensors import assert_same_tensors
from tests.peft_warnings import IGNORED

pytestmark = IGNORED


def same_bits(one: Path, other: Path) -> bool:
    a = load_file(one / WEIGHTS)
    b = load_file(other / WEIGHTS)
    assert read_config(one) == read_config(other)
    assert_same_tensors(a, b)
    return True


def ranks_of(adapted: list[Adapted]) -> list[tuple[Any, ...]]:
    """What is adapted in every layer, and its rank."""
    return [(a.projection, a.layer, a.rank) for a in adapted]


def scales_of(adapted: list[Adapted]) -> dict[str, float]:
    """HF module -> scale."""
    scales = {}
    for a in adapted:
        for module in a.hf_modules():
            scales[module] = a.scale
    return scales


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize(("base", "options"), CASES)
def test_export_import_export_is_bit_exact(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any], layout: str
) -> None:
    trained = train(bases[base], tmp_path / "checkpoint", torch.bfloat16, **options)
    export(trained.folder, tmp_path / "first", layout=layout)
    import_adapter(tmp_path / "first", tmp_path / "imported", str(bases[base]))
    export(tmp_path / "imported", tmp_path / "second", layout=layout)
    assert same_bits(tmp_path / "first", tmp_path / "second")
    # A checkpoint has the layout per_expert itself.
    assert layout != "per_expert" or same_bits(trained.folder, tmp_path / "first")


@pytest.mark.parametrize(("base", "options"), CASES)
def test_an_imported_adapter_is_what_was_trained(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    """Ranks, scales and coverage, without the padding; masters in float32, moments zero; the
    section says the same."""
    trained = train(bases[base], tmp_path / "adapter", **options)
    imported = import_adapter(trained.folder, tmp_path / "imported", str(bases[base]))
    again = resolve(LoRAConfig(**imported.section), trained.shape)
    assert ranks_of(again) == ranks_of(trained.adapted)

    masters = {}
    state = load_file(tmp_path / "imported" / OPTIMIZER)
    for name, tensor in state.items():
        if name.startswith("param."):
            masters[name.removeprefix("param.")] = tensor
        else:
            assert not tensor.any(), f"{name} is a moment and must be zero"
    # A master and two moments each.
    assert masters.keys() == trained.tensors.keys()
    assert len(state) == 3 * len(masters)

    new_scales = scales_of(again)
    for module, scale in scales_of(trained.adapted).items():
        a, b = factors_of(masters, module)
        trained_a, trained_b = factors_of(trained.tensors, module)
        assert torch.equal(a, trained_a)
        # The file may have folded a scale into B; the product with the section's scale counts.
        torch.testing.assert_close(b * new_scales[module], trained_b * scale, rtol=1e-6, atol=1e-8)


def test_an_expert_without_adapter_can_learn_after_import(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=2, target_modules=["down_proj"], layers=[1]
    )
    remove_tensors(trained.folder, "experts.5.down_proj")
    imported = import_adapter(trained.folder, tmp_path / "imported", str(bases["moe"]))
    said = "2 rows of A are zeros (1 of 8 linears whole); drawn anew, B zero"
    assert said in "\n".join(imported.notes)
    masters = load_file(tmp_path / "imported" / OPTIMIZER)
    module = "model.layers.1.mlp.experts.5.down_proj"
    a = masters[f"param.{tensor_name(module, 'A')}"]
    b = masters[f"param.{tensor_name(module, 'B')}"]
    # Where both were zero, neither would ever get a gradient.
    assert a.any(1).all()
    assert not b.any()
    after = loaded_by_peft(tmp_path / "imported", bases["moe"])
    _, before = read_logits(trained.folder, bases["moe"])
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5)


def test_what_an_import_writes(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj", *EXPERTS])
    imported = import_adapter(trained.folder, tmp_path / "imported", str(bases["moe"]))
    state = json.loads((tmp_path / "imported" / STATE_JSON).read_text())
    # Training goes on from step 0: an adapter has no optimizer state.
    assert state["step"] == 0 and state["imported_from"] == str(trained.folder)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {bases['moe']}}}\ndata: {{train: x.jsonl}}\ntrain: {{steps: 1}}\n"
        + (tmp_path / "imported" / LORA_SECTION).read_text()
    )
    assert load_config(config).lora == LoRAConfig(**imported.section)
    assert f"checkpoint.resume={tmp_path / 'imported'}" in imported.text()


@pytest.mark.parametrize("projection", ["gate", "lm_head"])
def test_nothing_trained_is_dropped_without_being_told(
    bases: dict[str, Path], tmp_path: Path, projection: str
) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj", projection]
    )
    for engine in ("vllm", "sglang"):
        out = tmp_path / engine
        if projection == "gate":
            with pytest.raises(
                ValueError,
                match="does not honour the adapter of gate, which was trained.*--drop gate",
            ):
                export(trained.folder, out, engine=engine)
            assert not out.exists()
            written = export(trained.folder, out, engine=engine, drop=["gate"])
            assert "mlp.gate." not in " ".join(load_file(out / WEIGHTS))
            assert "left out, as you asked: gate" in written.text()
            assert "left out of this file: `gate`" in (out / CARD).read_text()
        else:
            export(trained.folder, out, engine=engine)
            assert "base_model.model.lm_head.lora_A.weight" in load_file(out / WEIGHTS)
    # For no engine in particular, which is a note and no refusal.
    everywhere = export(trained.folder, tmp_path / "any")
    assert ("note: vLLM 0.32 loads it and then ignores it (gate)" in everywhere.text()) == (
        projection == "gate"
    )


def test_drop_must_name_what_was_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="--drop gate: this adapter has none; it adapts q_proj"):
        # A misspelt name would drop nothing, unnoticed.
        export(trained.folder, tmp_path / "out", drop=["gate"])
    with pytest.raises(ValueError, match="--drop q_proj leaves nothing"):
        export(trained.folder, tmp_path / "out", drop=["q_proj"])


def test_sglang_gets_one_rank_and_one_scale(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(
        bases["moe"], tmp_path / "adapter", rank=4, alpha=12.0, target_modules=["q_proj", *EXPERTS],
        rank_pattern={"up_proj": 3, "q_proj": 6}, alpha_pattern={"down_proj": 5.0}, use_rslora=True,
    )  # fmt: skip
    export(trained.folder, tmp_path / "out", engine="sglang")
    config = read_config(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    # The largest rank of all.
    assert config["r"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    attention = set()
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            assert tensor.shape[0] == 6, name
        if "self_attn" in name:
            attention.add(name.split(".")[6])
    # SGLang computes q, k and v as one product, so that an adapter of one needs all three.
    assert attention == {"q_proj", "k_proj", "v_proj"}
    # The file means the same: one scale, alpha / r, on every tensor.
    scale = config["lora_alpha"] / config["r"]
    for a, expert, delta in trained.deltas():
        a_factor, b_factor = factors_of(tensors, a.hf_module(expert))
        torch.testing.assert_close(scale * b_factor @ a_factor, delta, rtol=1e-5, atol=1e-7)


def test_shared_outer_only_where_experts_share(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=3, target_modules=EXPERTS)
    with pytest.raises(ValueError, match="the experts of layer 0 have different As in gate_proj"):
        export(trained.folder, tmp_path / "no", engine="sglang", layout="shared_outer")
    tensors = load_file(trained.folder / WEIGHTS)
    for name in tensors:
        # A of gate and up and B of down, which touch the hidden state: the first expert's for all.
        if ("down_proj" in name) == (".lora_B." in name):
            expert = name.split(".")[7]
            first = name.replace(f"experts.{expert}.", "experts.0.")
            tensors[name] = tensors[first].clone()
    save_file(tensors, trained.folder / WEIGHTS)
    export(trained.folder, tmp_path / "yes", engine="sglang", layout="shared_outer")
    written = load_file(tmp_path / "yes" / WEIGHTS)
    stem = "base_model.model.model.layers.2.mlp.experts.{}.lora_{}.weight"
    sizes = {name: tuple(t.shape) for name, t in written.items() if "layers.2." in name}
    e = trained.shape.num_experts
    h = trained.shape.hidden
    i = trained.shape.expert_intermediate
    assert sizes == {
        stem.format("gate_proj", "A"): (1, 3, h), stem.format("gate_proj", "B"): (e, i, 3),
        stem.format("up_proj", "A"): (1, 3, h), stem.format("up_proj", "B"): (e, i, 3),
        stem.format("down_proj", "A"): (e, 3, i), stem.format("down_proj", "B"): (1, h, 3),
    }  # fmt: skip
    for name in EXPERTS:
        a = written[stem.format(name, "A")]
        b = written[stem.format(name, "B")]
        for expert in range(e):
            own_a, own_b = factors_of(tensors, f"model.layers.2.mlp.experts.{expert}.{name}")
            # A shared factor has one entry for all experts.
            assert torch.equal(a[min(expert, len(a) - 1)], own_a)
            assert torch.equal(b[min(expert, len(b) - 1)], own_b)


@pytest.mark.parametrize(
    ("base", "options", "call", "message"),
    [
        (
            "moe",
            {},
            {"engine": "vllm", "layout": "shared_outer"},
            "--layout shared_outer: vLLM 0.32 reads per_expert",
        ),
        (
            "moe",
            {},
            {"layout": "shared_outer"},
            "--layout shared_outer: it must be one of per_expert, stacked, or --for an engine",
        ),
        (
            "shared",
            {},
            {"engine": "peft"},
            "PEFT 0.21 cannot load adapters of qwen2_moe's experts, one for each",
        ),
        (
            "mixed",
            {},
            {"engine": "sglang"},
            "SGLang 0.5.23 fails on adapters of models with dense layers among MoE layers",
        ),
        ("moe", {}, {"base": "/no/such"}, "--base=/no/such: no such folder"),
    ],
)
def test_exports_refused(
    bases, tmp_path: Path, base: str, options: dict, call: dict, message: str
) -> None:
    trained = train(bases[base], tmp_path / "adapter", rank=2, **options)
    with pytest.raises(ValueError) as caught:
        export(trained.folder, tmp_path / "out", **call)
    assert str(caught.value).startswith(message) and not (tmp_path / "out").exists()


def test_an_adapter_that_does_nothing_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    tensors = load_file(trained.folder / WEIGHTS)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.zero_()
    save_file(tensors, trained.folder / WEIGHTS)
    for call in (
        lambda: export(trained.folder, tmp_path / "o"),
        lambda: import_adapter(trained.folder, tmp_path / "i", str(bases["moe"])),
    ):
        with pytest.raises(ValueError, match="every B is zero: this adapter does nothing"):
            call()


def test_a_full_or_wrong_place_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export(trained.folder, tmp_path / "taken")
    with pytest.raises(ValueError, match="choose another folder"):
        export(trained.folder, trained.folder)


def test_the_card_says_what_it_is_and_how_to_load_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(
        bases["moe"],
        tmp_path / "step_000007",
        rank=2,
        target_modules=["up_proj", *ATTENTION],
        layers=[0, 1, 3],
    )
    (trained.folder / STATE_JSON).parent.mkdir()
    config = {
        "data": {"train": "chats.jsonl"}, "model": {"dtype": "bfloat16"},
        "train": {"global_batch_size": 8, "lr": 1e-4, "schedule": "cosine"},
    }  # fmt: skip
    (trained.folder / STATE_JSON).write_text(
        json.dumps({"step": 7, "num_samples": 1234, "config": config})
    )
    # What proves a served adapter goes with it.
    (trained.folder / PROBE).write_text("{}")
    export(trained.folder, tmp_path / "mine", engine="vllm")
    text = (tmp_path / "mine" / CARD).read_text()
    for part in (
        f"base_model: {bases['moe']}\nlibrary_name: peft",
        "- Training data: `chats.jsonl`, 1,234 samples",
        "- Steps: 7 of 8 samples, learning rate 0.0001 (cosine)",
        "| `mlp.experts.up_proj` | 2 | 16 | 0-1, 3 | 8 |",
        "| `self_attn.q_proj` | 2 | 16 | 0-1, 3 |  |",
        "`mlp.experts.down_proj`, `mlp.experts.gate_proj`: not trained; zeros in this file",
        'model = PeftModel.from_pretrained(base, "mine")',
        "--max-lora-rank 8 --lora-modules mine=./mine",
    ):
        assert part in text, part
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == sorted(
        [CARD, CONFIG, WEIGHTS, PROBE]
    )


def test_padding_is_taken_off_and_nothing_else(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(
        bases["moe"],
        tmp_path / "a",
        rank=4,
        target_modules=["gate_proj"],
        rank_pattern={"gate_proj": 3},
    )
    # In the file gate is padded to rank 4, and up and down are zeros.
    form = trained_form(read_adapter(trained.folder, trained.shape), trained.shape)
    assert {(a.name, a.rank) for a in form.adapter.adapted} == {("gate_proj", 3)}
    assert "layer 0 up_proj: zeros, not adapted" in form.notes


def test_logits_of_every_export_are_the_same(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(
        bases["moe"],
        tmp_path / "a",
        rank=4,
        use_rslora=True,
        rank_pattern={"up_proj": 2, "o_proj": 3},
    )
    found = []
    for name, call in {
        "per_expert": {},
        "stacked": {"layout": "stacked"},
        "uniform": {"engine": "sglang"},
    }.items():
        export(trained.folder, tmp_path / name, **call)
        found.append(loaded_by_peft(tmp_path / name, trained.base))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=2e-5)
