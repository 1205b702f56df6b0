"""Adapters with a score head: exported, imported, merged, verified, and refused where a language
model is needed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megalora.adapters.export import export
from megalora.adapters.files import CONFIG, STATE_JSON, WEIGHTS
from megalora.adapters.inspect import describe
from megalora.adapters.merge import merge
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.resumable import import_adapter
from megalora.adapters.write.form import write_adapter
from megalora.chat.command import find_models
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape
from megalora.tiny import make_tiny
from megalora.verify.peft import verify_peft
from tests.parity.built import random_factors
from tests.peft_warnings import IGNORED
from tests.whole_state import whole_state

pytestmark = IGNORED
SCORE = "base_model.model.score.weight"
LORA = LoRAConfig(rank=4, alpha=12.0)


@pytest.fixture(scope="module")
def classifier(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of attention and experts with a head of three scores."""
    folder = tmp_path_factory.mktemp("score") / "adapter"
    folder.mkdir()
    write(folder, tiny)
    return folder


def write(folder: Path, base: Path, lora: LoRAConfig = LORA) -> None:
    shape = replace(model_shape(read_hf_config(base)), num_scores=3)
    adapted, factors = random_factors(lora, base, num_scores=3)
    write_adapter(folder, adapted, shape, factors, str(base))


def logits_of(model: Any, pad: int) -> torch.Tensor:
    """[2, C]: of two samples of other lengths, padded."""
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 8:] = pad
    mask[1, 8:] = 0
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits


def in_peft(base: Path, adapter: Path) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(base).pad_token_id
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def test_stock_peft_verifies_it(classifier: Path, tiny: Path) -> None:
    report = verify_peft(classifier, str(tiny), atol=1e-4)
    assert report.ok, report.text()
    assert report.difference < 2e-5 and report.effect > 0.01


@pytest.mark.slow
def test_verify_sees_another_head(
    classifier: Path, tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    """Ours from one file, PEFT's from another: scores differ where the head does."""
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(classifier / WEIGHTS)
    tensors[SCORE] = tensors[SCORE].flip(0)
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    (other / CONFIG).write_text((classifier / CONFIG).read_text())
    import megalora.verify.peft as verify

    theirs = verify._peft_logits
    monkeypatch.setattr(verify, "_peft_logits", lambda _, *rest: theirs(other, *rest))
    report = verify_peft(classifier, str(tiny), atol=1e-4)
    assert not report.ok and report.first_layer is None


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_merged_folder_is_a_classifier(
    tied: bool, tiny: Path, classifier: Path, tmp_path: Path
) -> None:
    base = tiny
    adapter = classifier
    if tied:
        base = make_tiny(tmp_path / "base", tie_word_embeddings=True)
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        write(adapter, base)
    merge(adapter, str(base), tmp_path / "merged")
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "Qwen3MoeForSequenceClassification"
    assert model.config.num_labels == 3
    pad = AutoTokenizer.from_pretrained(base).pad_token_id
    assert model.config.pad_token_id == pad
    expected = logits_of(in_peft(base, adapter), pad)
    assert (logits_of(model, pad) - expected).abs().max() < 1e-4 < expected.abs().max()
    stored: list[str] = []
    for shard in (tmp_path / "merged").glob("*.safetensors"):
        stored += load_file(shard)
    assert "score.weight" in stored and "lm_head.weight" not in stored


def test_merged_labels_are_those_of_the_run(classifier: Path, tiny: Path, tmp_path: Path) -> None:
    named = with_state(classifier, tmp_path / "named", ["bad", "so so", "good"])
    merge(named, str(tiny), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "so so", "2": "good"}
    assert config["label2id"] == {"bad": 0, "so so": 1, "good": 2}


def with_state(adapter: Path, folder: Path, labels: list[str]) -> Path:
    """The adapter in a folder with the state of the run that made it, but for the optimizer's."""
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((adapter / name).read_bytes())
    (folder / "training_state").mkdir()
    config = {
        "objective": {"name": "classify", "labels": labels, "num_labels": None, "loss": "sigmoid"},
        "data": {"train": "rows.jsonl"}, "model": {"dtype": "float32"},
        "train": {"global_batch_size": 4, "lr": 1e-4, "schedule": "constant"},
    }  # fmt: skip
    state = {"step": 7, "num_samples": 12, "config": config}
    (folder / STATE_JSON).write_text(json.dumps(state))
    return folder


def test_an_export_has_the_head_and_its_card_says_how_to_load_it(
    classifier: Path, tiny: Path, tmp_path: Path
) -> None:
    named = with_state(classifier, tmp_path / "named", ["bad", "so so", "good"])
    export(named, tmp_path / "out")
    assert torch.equal(
        load_file(tmp_path / "out" / WEIGHTS)[SCORE], load_file(classifier / WEIGHTS)[SCORE]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "pipeline_tag: text-classification", "12 samples", "Objective: classify",
        "labels 0 bad, 1 so so, 2 good", "num_labels=3, id2label={0: 'bad', 1: 'so so'",
        "base.config.pad_token_id = tokenizer.pad_token_id",
    ):  # fmt: skip
        assert part in card, part
    assert f"vllm serve {tiny} --runner pooling --convert classify --hf-overrides" in card
    # The code in it runs, but for the name of the folder.
    code = (
        card.split("```python\n")[1].split("```")[0].replace('"out"', repr(str(tmp_path / "out")))
    )
    names: dict[str, Any] = {}
    exec(code, names)
    pad = names["tokenizer"].pad_token_id
    assert names["base"].config.id2label == {0: "bad", 1: "so so", 2: "good"}
    expected = logits_of(in_peft(tiny, classifier), pad)
    assert torch.equal(logits_of(names["model"].eval(), pad), expected)


def test_no_server_without_heads_is_given_one(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without the score head .* megalora merge ADAPTER --base"):
        export(classifier, tmp_path / "out", engine="sglang")


def test_what_vllm_does_not_honour_beside_a_head(tiny: Path, tmp_path: Path) -> None:
    """tests/serve/test_classify.py serves one without a router."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(folder, tiny, replace(LORA, target_modules=["q_proj", "gate"]))
    with pytest.raises(ValueError, match="vLLM 0.32 does not honour the adapter of gate"):
        export(folder, tmp_path / "out", engine="vllm")
    export(folder, tmp_path / "out", engine="vllm", drop=["gate"])
    assert "vllm serve" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_of_peft_is_imported_with_its_head(tiny: Path, tmp_path: Path) -> None:
    """As PEFT's own training leaves it, with the names of both heads that it knows."""
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "o_proj"])
    wrapped = get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    said = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert set(said["modules_to_save"]) == {"classifier", "score"}
    imported = import_adapter(tmp_path / "theirs", tmp_path / "ours", str(tiny))
    assert imported.num_tensors == 4 * 2 * 2 + 1
    theirs = load_file(tmp_path / "theirs" / WEIGHTS)[SCORE]
    masters = whole_state(tmp_path / "ours")
    assert torch.equal(masters[f"param.{SCORE}"], theirs)
    assert not masters[f"exp_avg.{SCORE}"].any()
    assert json.loads((tmp_path / "ours" / STATE_JSON).read_text())["num_scores"] == 3
    # A second export is the same file, head included.
    export(tmp_path / "ours", tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / WEIGHTS)[SCORE], theirs)


def test_what_writes_text_refuses_it(classifier: Path, tiny: Path) -> None:
    with pytest.raises(ValueError, match="a classifier or reward model .* writes no text"):
        find_models(str(classifier), str(tiny))
    shape = model_shape(read_hf_config(tiny))
    with pytest.raises(ValueError, match="score head in place of lm_head and writes no text"):
        read_adapter(classifier, shape, base=tiny)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lost": True}, "has 0 tensors for score.weight, which its config saves"),
        ({"hidden": 1}, "is .3, 1., but this base model needs .number of labels, 64."),
        (
            {"task_type": "CAUSAL_LM"},
            r"modules_to_save=\['score'\]: megalora reads a score head where",
        ),
        ({"modules_to_save": ["score", "lm_head"]}, "all that is trained whole and task_type"),
        ({"modules_to_save": None}, "it is a whole weight"),
    ],
)
def test_folders_that_are_refused(
    change: dict[str, Any], message: str, classifier: Path, tiny: Path, tmp_path: Path
) -> None:
    tensors = load_file(classifier / WEIGHTS)
    config = json.loads((classifier / CONFIG).read_text())
    if change.pop("lost", False):
        del tensors[SCORE]
    if hidden := change.pop("hidden", 0):
        tensors[SCORE] = tensors[SCORE][:, :hidden].contiguous()
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    shape = model_shape(read_hf_config(tiny))
    message = message.replace("64", str(shape.hidden))
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path, shape, base=tiny, score=True)


def test_families_without_a_classifier_are_refused() -> None:
    from tests.parity.models import shape_of

    for model in ("olmoe", "glm4_moe"):
        shape = replace(shape_of(model), num_scores=2)
        name = FAMILIES[shape.model_type].classifier
        with pytest.raises(ValueError, match=f"transformers has no {name}, so that nothing could"):
            resolve(LORA, shape)
    with pytest.raises(ValueError, match="lm_head"):
        resolve(replace(LORA, target_modules=["lm_head"]), replace(shape_of("moe"), num_scores=2))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_classifiers_are_those_of_transformers(name: str) -> None:
    """A family that transformers has got a classifier for since is no longer to be refused."""
    family = FAMILIES[name]
    assert hasattr(transformers, family.classifier) == family.has_classifier
    assert hasattr(transformers, family.causal_lm)


def test_inspect_says_what_it_is(classifier: Path) -> None:
    text = describe(classifier)
    assert "score.weight: 3 x " in text and "trained whole" in text
    assert "refuse" not in text
