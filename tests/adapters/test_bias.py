"""Read, write, merge, refuse and train on adapters with trained biases of the base (``bias``),
compared with stock PEFT."""

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
from megalora.config import CheckpointConfig, LoRAConfig, ParallelConfig
from megalora.config.train import Relora
from megalora.lora.select import plan
from megalora.serve.check import AdapterInvalid, check_adapter
from megalora.train.loop import train
from megalora.verify.peft import verify_peft
from tests.adapters.adapters import logits
from tests.adapters.merging import read as read_weights
from tests.adapters.stock import ATOL, base_model, new_adapter, refusal
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

TARGETS = ["q_proj", "v_proj", "o_proj"]
ADAPTED = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
OTHER = "base_model.model.model.layers.0.self_attn.k_proj.bias"


def of_peft(base: Path, folder: Path, bias: str = "all") -> tuple[Any, Tensor]:
    """Stock PEFT's model whose biases have moved, saved to the folder, and its logits."""
    model = new_adapter(base, target_modules=TARGETS, bias=bias)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model, logits(model)


@pytest.mark.parametrize(("bias", "count"), [("all", 9), ("lora_only", 6)])
def test_a_folder_of_peft_is_read_merged_and_exported(
    bias: str, count: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Of three layers all biases, or those of q and v: o has an adapter and no bias."""
    base = bases["shared"]
    model, expected = of_peft(base, tmp_path / "peft", bias)
    export(tmp_path / "peft", tmp_path / "out", engine="peft", base=str(base))
    own = load_file(tmp_path / "out" / WEIGHTS)
    theirs = load_file(tmp_path / "peft" / WEIGHTS)
    named = [name for name in own if name.endswith(".bias")]
    assert sorted(named) == sorted(name for name in theirs if name.endswith(".bias"))
    assert len(named) == count and ADAPTED in named and (OTHER in named) == (bias == "all")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["bias"] == bias
    found = logits(PeftModel.from_pretrained(base_model(base), str(tmp_path / "out")).eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)

    merge(tmp_path / "peft", str(base), tmp_path / "merged")
    wanted = dict(model.merge_and_unload().named_parameters())
    before = read_weights(base)
    changed = 0
    for name, value in read_weights(tmp_path / "merged").items():
        if name.endswith(".bias"):
            torch.testing.assert_close(value, wanted[name].data, rtol=0, atol=0)
            changed += not torch.equal(value, before[name])
    assert changed == count
    torch.testing.assert_close(logits(base_model(tmp_path / "merged")), expected, rtol=0, atol=ATOL)


def test_no_server_is_given_biases(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["shared"]
    of_peft(base, tmp_path / "peft")
    for engine in ("vllm", "sglang"):
        with pytest.raises(ValueError, match=r"does not load .*\(lora.bias\).*: megalora merge"):
            export(tmp_path / "peft", tmp_path / engine, engine=engine, base=str(base))
    with pytest.raises(AdapterInvalid, match="vLLM does not serve bias='all'"):
        check_adapter(tmp_path / "peft")
    said = describe(tmp_path / "peft")
    assert "self_attn.k_proj.bias: 3 tensors" in said and "no LoRA factor" not in said
    assert "does not load an adapter with bias" in said
    export(tmp_path / "peft", tmp_path / "out", base=str(base))
    card = (tmp_path / "out" / CARD).read_text()
    assert "Trained biases of the base: 9, of `self_attn.q_proj`" in card
    assert "do not load biases of the base" in card


@pytest.mark.slow
def test_training_goes_on_from_a_folder_of_peft(
    bases: dict[str, Path], chats: Path, tmp_path: Path
) -> None:
    """Imported, trained on two ranks, resumed on one, verified, and merged as PEFT computes it."""
    base = bases["shared"]
    of_peft(base, tmp_path / "peft", "lora_only")
    section = import_adapter(tmp_path / "peft", tmp_path / "start", str(base)).section
    assert section["bias"] == "lora_only"
    options: dict[str, Any] = {"lora": LoRAConfig(**section), "steps": 2, "lr": 1e-3}
    config = make_config(base, chats, tmp_path / "run", {"tp": 2, "ep": 2}, **options)
    first = CheckpointConfig(dir=str(tmp_path / "run"), resume=str(tmp_path / "start"), every=1)
    run_ranks(train, 2, replace(config, checkpoint=first))
    alone = make_config(base, chats, tmp_path / "alone", {}, **options)
    rest = CheckpointConfig(dir=str(tmp_path / "alone"), resume=str(tmp_path / "run/step_000001"))
    run_ranks(train, 1, replace(alone, checkpoint=rest))
    folder = tmp_path / "alone/step_000002"
    found = load_file(folder / WEIGHTS)
    for name, tensor in load_file(tmp_path / "run/step_000002" / WEIGHTS).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5)
    assert (found[ADAPTED] - load_file(tmp_path / "peft" / WEIGHTS)[ADAPTED]).abs().max() > 1e-4
    report = verify_peft(folder, str(base), atol=1e-4)
    assert report.text().endswith("verified: stock PEFT computes the same model")
    merge(folder, str(base), tmp_path / "merged")
    peft = logits(PeftModel.from_pretrained(base_model(base), str(folder)).eval())
    torch.testing.assert_close(peft, logits(base_model(tmp_path / "merged")), rtol=0, atol=ATOL)
    anew = replace(first, dir=str(tmp_path / "other"))
    other = replace(alone, lora=replace(config.lora, bias="all"))
    with pytest.raises(Exception, match="trains other weights of the base"):
        run_ranks(train, 1, replace(other, checkpoint=anew))


def without(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors[OTHER]


def shorter(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[OTHER] = tensors[OTHER][1:].clone()


def unsaid(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["bias"] = "none"


def unknown(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["bias"] = "boft_only"


def both(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["lora_bias"] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "has 0 tensors for model.layers.0.self_attn.k_proj.bias, which its config saves"),
        (shorter, "but this base model needs"),
        (unsaid, "it is a bias of the base"),
        (unknown, "bias must be none, all or lora_only"),
        (both, "bias=all and lora_bias change the same biases"),
    ],
)
def test_bad_biases_are_refused(
    change: Any, message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    of_peft(bases["shared"], tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    config = json.loads((tmp_path / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert message in refusal(tmp_path, bases["shared"])


def test_a_dropped_adapter_takes_no_bias_along(bases: dict[str, Path], tmp_path: Path) -> None:
    of_peft(bases["shared"], tmp_path / "peft", "lora_only")
    with pytest.raises(ValueError, match=r"is left of model.layers.0.self_attn.v_proj.*Leave noth"):
        export(tmp_path / "peft", tmp_path / "out", drop=["v_proj"], base=str(bases["shared"]))


def test_what_biases_cannot_be_beside_is_refused(
    tiny: Path, chats: Path, tmp_path: Path, bases: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="lora.bias=all: this base has no biases; leave it out"):
        plan(LoRAConfig(bias="all"), ParallelConfig(), tiny)
    without = LoRAConfig(bias="lora_only", target_modules=["o_proj"])
    with pytest.raises(ValueError, match="lora.bias=lora_only: none of the adapted linears has"):
        plan(without, ParallelConfig(), bases["shared"])
    half = LoRAConfig(bias="all", target_modules=["q_proj", "v_proj"], use_dora=["q_proj"])
    with pytest.raises(ValueError, match="PEFT loads one adapter with trained biases"):
        plan(half, ParallelConfig(), bases["shared"])
    config = make_config(tiny, chats, tmp_path, {}, lora=LoRAConfig(bias="all"))
    with pytest.raises(ValueError, match="lora.bias: train.relora reads the base from disk"):
        replace(config, train=replace(config.train, relora=Relora(every=1)))
    served = CheckpointConfig(dir=str(tmp_path), serve="http://127.0.0.1:8000")
    with pytest.raises(ValueError, match="checkpoint.serve: vLLM does not load lora.bias"):
        replace(config, checkpoint=served)
    with pytest.raises(ValueError, match="lora.bias=all and lora.lora_bias change the same"):
        LoRAConfig(bias="all", lora_bias=True)
