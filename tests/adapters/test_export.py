"""Export adapters for one engine: what it reads, what it would drop unnoticed, and the card."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.export import export
from megalora.adapters.files import CARD, CONFIG, PROBE, STATE_JSON, WEIGHTS, read_config
from megalora.config import ObjectiveConfig
from tests.adapters.adapters import ATTENTION, EXPERTS, train
from tests.adapters.folders import factors_of
from tests.adapters.stock import loaded_by_peft
from tests.named_tensors import only_parts
from tests.peft_warnings import IGNORED

pytestmark = IGNORED


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
            # Whoever gets the file alone learns it from the card.
            assert "left out, as you asked: gate" in written.text()
            assert "left out of this file: `gate`" in (out / CARD).read_text()
        else:
            # The head, which both engines honour.
            export(trained.folder, out, engine=engine)
            assert "base_model.model.lm_head.lora_A.weight" in load_file(out / WEIGHTS)
    # For no engine in particular, which is a note and no refusal.
    text = export(trained.folder, tmp_path / "any").text()
    is_noted = "note: vLLM 0.32 loads it and then ignores it (gate)" in text
    assert is_noted == (projection == "gate")


def test_drop_must_name_what_was_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    # A misspelt name would drop nothing, unnoticed.
    with pytest.raises(ValueError, match="--drop gate: this adapter has none; it adapts q_proj"):
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
        # A is [rank, in].
        if ".lora_A." in name:
            assert tensor.shape[0] == 6, name
        # base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight
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
            # base_model.model.model.layers.N.mlp.experts.E.gate_proj...
            expert = name.split(".")[7]
            first = name.replace(f"experts.{expert}.", "experts.0.")
            tensors[name] = tensors[first].clone()
    save_file(tensors, trained.folder / WEIGHTS)
    export(trained.folder, tmp_path / "yes", engine="sglang", layout="shared_outer")
    written = load_file(tmp_path / "yes" / WEIGHTS)
    stem = "base_model.model.model.layers.2.mlp.experts.{}.lora_{}.weight"
    sizes = {}
    for name, tensor in only_parts("layers.2.")(written).items():
        sizes[name] = tuple(tensor.shape)
    # 1 where shared: A of gate and up, B of down.
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
        # SGLang's own layout, for no engine in particular.
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
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


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
    # What the card says of training is in a checkpoint's training state.
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
    # Columns of a table: rank 2, alpha 16, layers 0, 1 and 3, 8 experts. vLLM's smallest
    # --max-lora-rank above 1 is 8.
    for part in (
        f"base_model: {bases['moe']}\nlibrary_name: peft",
        "- Training data: `chats.jsonl`, 1,234 samples",
        "- Objective: supervised fine-tuning",
        "- Steps: 7 of 8 samples, learning rate 0.0001 (cosine)",
        "| `mlp.experts.up_proj` | 2 | 16 | 0-1, 3 | 8 |",
        "| `self_attn.q_proj` | 2 | 16 | 0-1, 3 |  |",
        "`mlp.experts.down_proj`, `mlp.experts.gate_proj`: not trained; zeros in this file",
        'model = PeftModel.from_pretrained(base, "mine")',
        "--max-lora-rank 8 --lora-modules mine=./mine",
    ):
        assert part in text, part
    # The training state stays behind: it is of no use to who loads the adapter.
    written = {path.name for path in (tmp_path / "mine").iterdir()}
    assert written == {CARD, CONFIG, WEIGHTS, PROBE}


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            ObjectiveConfig(name="dpo", loss="robust", beta=0.2, label_smoothing=0.1),
            "dpo, loss robust, beta 0.2, label_smoothing 0.1; the reference is the base",
        ),
        (
            ObjectiveConfig(name="dpo", reference="start"),
            "dpo, loss sigmoid; the reference is the adapter at the start",
        ),
        (
            ObjectiveConfig(name="kto", beta=0.2, desirable_weight=1.5),
            "kto, beta 0.2, desirable_weight 1.5, undesirable_weight 1; the reference is the base",
        ),
        (ObjectiveConfig(name="simpo", margin=0.4), "simpo, margin 0.4"),
        (ObjectiveConfig(name="simpo", margin=0.0), "simpo, margin 0"),
    ],
)
def test_the_card_of_preferences(
    bases: dict[str, Path], tmp_path: Path, objective: ObjectiveConfig, said: str
) -> None:
    trained = train(bases["dense"], tmp_path / "step_000007", target_modules=["q_proj"])
    (trained.folder / STATE_JSON).parent.mkdir()
    config = {
        "data": {"train": "pairs.jsonl"}, "model": {"dtype": "float32"},
        "objective": asdict(objective),
        "train": {"global_batch_size": 8, "lr": 1e-4, "schedule": "cosine"},
    }  # fmt: skip
    (trained.folder / STATE_JSON).write_text(
        json.dumps({"step": 7, "num_samples": 50, "config": config})
    )
    export(trained.folder, tmp_path / "mine")
    text = (tmp_path / "mine" / CARD).read_text()
    samples = "samples" if objective.name == "kto" else "pairs"
    assert f"- Training data: `pairs.jsonl`, 50 {samples}\n" in text
    assert f"- Objective: {said}\n- Steps: 7 of 8 {samples}, " in text


def test_logits_of_every_export_are_the_same(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(
        bases["moe"],
        tmp_path / "a",
        rank=4,
        use_rslora=True,
        rank_pattern={"up_proj": 2, "o_proj": 3},
    )
    export(trained.folder, tmp_path / "per expert")
    expected = loaded_by_peft(tmp_path / "per expert", trained.base)
    # Stock PEFT reads what is written for SGLang too: padded matrices with one scale.
    for name, call in {
        "stacked": {"layout": "stacked"},
        "uniform": {"engine": "sglang"},
    }.items():
        export(trained.folder, tmp_path / name, **call)
        found = loaded_by_peft(tmp_path / name, trained.base)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
