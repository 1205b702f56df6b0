"""Read, write, merge, refuse and train on adapters with a bias of every B (``lora_bias``), compared
with stock PEFT."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.export import export
from megalora.adapters.files import CARD, CONFIG, WEIGHTS
from megalora.adapters.inspect import describe
from megalora.adapters.merge import merge
from megalora.adapters.resumable import import_adapter
from megalora.config import CheckpointConfig, LoRAConfig
from megalora.config.train import Relora
from megalora.serve.check import AdapterInvalid, check_adapter
from megalora.train.loop import train
from tests.adapters.adapters import logits
from tests.adapters.merging import read as read_weights
from tests.adapters.stock import ATOL, base_model, new_adapter, refusal
from tests.distributed.ranks import run_ranks
from tests.lora.shapes import SHARED_SHAPE
from tests.lora.shapes import refusal as refusal_of_section
from tests.parity.runs import make_config
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

QKV = ["q_proj", "k_proj", "v_proj"]
BIAS = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"


def of_peft(base: Path, folder: Path) -> tuple[Any, Tensor]:
    """Stock PEFT's model with trained biases of B, saved to the folder, and its logits."""
    model = new_adapter(base, target_modules=QKV, lora_bias=True, rank_pattern={"v_proj": 2})
    model.save_pretrained(folder)
    return model, logits(model)


def test_merging_is_peft_s(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["shared"]
    model, _ = of_peft(base, tmp_path / "peft")
    merge(tmp_path / "peft", str(base), tmp_path / "merged")
    found = read_weights(tmp_path / "merged")
    wanted = dict(model.merge_and_unload().named_parameters())
    changed: list[str] = []
    for name, before in read_weights(base).items():
        if not torch.equal(found[name], before):
            changed.append(name)
            torch.testing.assert_close(found[name], wanted[name].data, rtol=1e-5, atol=1e-6)
    # Weight and bias of three linears in three layers.
    assert len(changed) == 18 and sum(name.endswith(".bias") for name in changed) == 9


def test_an_export_is_what_peft_computes(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["shared"]
    _, expected = of_peft(base, tmp_path / "peft")
    export(tmp_path / "peft", tmp_path / "out", engine="peft", base=str(base))
    found = logits(PeftModel.from_pretrained(base_model(base), str(tmp_path / "out")).eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    assert "do not load biases of B" in (tmp_path / "out" / CARD).read_text()
    for engine in ("vllm", "sglang"):
        with pytest.raises(ValueError, match=r"does not load biases of B .*: megalora merge"):
            export(tmp_path / "peft", tmp_path / engine, engine=engine, base=str(base))
    with pytest.raises(AdapterInvalid, match="vLLM does not serve lora_bias=True"):
        check_adapter(tmp_path / "peft")
    said = describe(tmp_path / "peft")
    assert "does not load an adapter with lora_bias" in said and "no LoRA factor" not in said


@pytest.mark.slow
def test_training_goes_on_from_a_folder_of_peft(
    bases: dict[str, Path], chats: Path, tmp_path: Path
) -> None:
    """Imported, trained on two ranks, resumed on one, exported and loaded in PEFT again."""
    base = bases["shared"]
    of_peft(base, tmp_path / "peft")
    section = import_adapter(tmp_path / "peft", tmp_path / "start", str(base)).section
    assert section["lora_bias"] is True
    options: dict[str, Any] = {"lora": LoRAConfig(**section), "steps": 2, "lr": 1e-4}
    config = make_config(base, chats, tmp_path / "run", {"tp": 2, "ep": 2}, **options)
    first = CheckpointConfig(dir=str(tmp_path / "run"), resume=str(tmp_path / "start"), every=1)
    run_ranks(train, 2, replace(config, checkpoint=first))
    alone = make_config(base, chats, tmp_path / "alone", {}, **options)
    rest = CheckpointConfig(dir=str(tmp_path / "alone"), resume=str(tmp_path / "run/step_000001"))
    run_ranks(train, 1, replace(alone, checkpoint=rest))
    whole = load_file(tmp_path / "run/step_000002" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "alone/step_000002" / WEIGHTS).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=2e-5)
    start = load_file(tmp_path / "peft" / WEIGHTS)
    assert (whole[BIAS] - start[BIAS]).abs().max() > 1e-4
    export(tmp_path / "run/step_000002", tmp_path / "out", engine="peft")
    merge(tmp_path / "run/step_000002", str(base), tmp_path / "merged")
    found = logits(PeftModel.from_pretrained(base_model(base), str(tmp_path / "out")).eval())
    merged = logits(base_model(tmp_path / "merged"))
    torch.testing.assert_close(found, merged, rtol=0, atol=ATOL)


def without(tensors: dict[str, Tensor]) -> None:
    del tensors[BIAS]


def shorter(tensors: dict[str, Tensor]) -> None:
    tensors[BIAS] = tensors[BIAS][1:].clone()


def of_another(tensors: dict[str, Tensor]) -> None:
    tensors[BIAS.replace("q_proj", "o_proj")] = tensors.pop(BIAS)[:96].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "lacks the bias of B of model.layers.0.self_attn.q_proj, and lora_bias"),
        (shorter, "this base model and rank need"),
        (of_another, "model.layers.0.self_attn.o_proj has none in this base"),
    ],
)
def test_bad_biases_are_refused(
    change: Any, message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    of_peft(bases["shared"], tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert message in refusal(tmp_path, bases["shared"])


def test_biases_without_the_option_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    of_peft(bases["shared"], tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"lora_bias": False}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    said = refusal(tmp_path, bases["shared"])
    assert "has the bias of B of" in said and "lora_bias in adapter_config.json is false" in said


def test_what_biases_cannot_be_beside_is_refused(tiny: Path, chats: Path, tmp_path: Path) -> None:
    said = refusal_of_section(SHARED_SHAPE, target_modules=[*QKV, "o_proj"], lora_bias=True)
    assert "lora.lora_bias: self_attn.o_proj has no bias in this base" in said
    with pytest.raises(ValueError, match="lora.lora_bias is not there with lora.use_dora"):
        LoRAConfig(lora_bias=True, use_dora=True)
    with pytest.raises(ValueError, match="lora.init=olora is not there with lora.lora_bias"):
        LoRAConfig(lora_bias=True, init="olora")
    lora = LoRAConfig(target_modules=QKV, lora_bias=True)
    config = make_config(tiny, chats, tmp_path, {}, lora=lora)
    with pytest.raises(ValueError, match="lora.lora_bias: train.relora adds up B A"):
        replace(config, train=replace(config.train, relora=Relora(every=1)))
    served = CheckpointConfig(dir=str(tmp_path), serve="http://127.0.0.1:8000")
    with pytest.raises(ValueError, match="checkpoint.serve: vLLM does not load lora_bias"):
        replace(config, checkpoint=served)
