"""Read, train on, write, merge and refuse adapters with DoRA, compared with stock PEFT."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megalora.adapters.export import export
from megalora.adapters.files import CARD, CONFIG, WEIGHTS
from megalora.adapters.inspect import describe
from megalora.adapters.merge import merge
from megalora.adapters.read.adapter import read_adapter
from megalora.config import LoRAConfig, ModelConfig, ParallelConfig
from megalora.lora.adapted_model import build_adapted, load_adapter
from megalora.lora.section import lora_section, settings
from megalora.lora.select import resolve
from megalora.model.build import build_model
from megalora.parallel import parallel_groups
from megalora.serve.check import AdapterInvalid, check_adapter
from tests.adapters.adapters import load_base, logits
from tests.adapters.merging import read as read_weights
from tests.adapters.merging import train
from tests.adapters.stock import ATOL, base_model, new_adapter, refusal, shape_of
from tests.distributed.ranks import run_ranks
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# In a model with experts PEFT has DoRA on attention alone.
TARGETS = {
    "moe": ATTENTION,
    "shared": ["q_proj", "v_proj"],
    "dense": [*ATTENTION, "gate_proj", "down_proj"],
}


def of_peft(base: Path, folder: Path, targets: list[str]) -> tuple[Any, Tensor]:
    """Stock PEFT's model with DoRA as after some training, saved to the folder, and its logits."""
    model = new_adapter(base, target_modules=targets, use_dora=True, rank_pattern={"v_proj": 2})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 0.7 + 0.6 * torch.rand(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model, logits(model)


def own_logits(folder: Path, base: Path) -> Tensor:
    """Logits of megalora's own model with the adapter; a rank function."""
    shape = shape_of(base)
    adapter = read_adapter(folder, shape)
    tokens = torch.randint(512, (2, 23), generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), parallel_groups(ParallelConfig()) as groups:
        model = build_adapted(
            partial(build_model, folder=base), shape, adapter.adapted, groups,
            model=ModelConfig(path=str(base), dtype="float32"), parallel=ParallelConfig(),
            lora=LoRAConfig(), seed=0,
        )  # fmt: skip
        load_adapter(model, adapter.tensors)
        return model.chunks[0].eval()(tokens, None, None).clone()


# For ``make test`` one of them.
SOME = [pytest.param(name, marks=[] if name == "moe" else pytest.mark.slow) for name in TARGETS]


@pytest.mark.parametrize("name", SOME)
def test_a_folder_of_peft_means_the_same_here(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[name]
    _, expected = of_peft(base, tmp_path / "peft", TARGETS[name])
    found = run_ranks(own_logits, 1, tmp_path / "peft", base)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    assert (expected - logits(base_model(base))).abs().max() > 0.1


@pytest.mark.parametrize("name", SOME)
def test_merging_is_peft_s(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[name]
    model, _ = of_peft(base, tmp_path / "peft", TARGETS[name])
    merge(tmp_path / "peft", str(base), tmp_path / "merged")
    found = read_weights(tmp_path / "merged")
    wanted = dict(model.merge_and_unload().named_parameters())
    changed = 0
    for tensor, before in read_weights(base).items():
        if torch.equal(found[tensor], before):
            continue
        changed += 1
        torch.testing.assert_close(found[tensor], wanted[tensor].data, rtol=1e-5, atol=1e-6)
    assert changed == len(TARGETS[name]) * shape_of(base).num_layers


def test_merging_in_small_blocks_is_the_same(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block takes its own rows' magnitudes."""
    of_peft(bases["moe"], tmp_path / "peft", ATTENTION)
    merge(tmp_path / "peft", str(bases["moe"]), tmp_path / "whole")
    monkeypatch.setattr("megalora.adapters.merge.BLOCK_BYTES", 4 * 64 * 7)
    merge(tmp_path / "peft", str(bases["moe"]), tmp_path / "blocks")
    blocks = read_weights(tmp_path / "blocks")
    for name, weight in read_weights(tmp_path / "whole").items():
        torch.testing.assert_close(blocks[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SOME[::2])
def test_an_export_is_what_peft_computes(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[name]
    _, expected = of_peft(base, tmp_path / "peft", TARGETS[name])
    export(tmp_path / "peft", tmp_path / "out", engine="peft", base=str(base))
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    magnitudes = [t for name, t in tensors.items() if name.endswith("lora_magnitude_vector")]
    assert magnitudes and all(t.dtype == torch.float32 for t in magnitudes)
    found = logits(PeftModel.from_pretrained(base_model(base), str(tmp_path / "out")).eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    card = (tmp_path / "out" / CARD).read_text()
    assert "A DoRA adapter" in card and "megalora merge" in card and "vllm serve" not in card


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_servers_are_refused_with_the_way_out(
    engine: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    of_peft(bases["moe"], tmp_path / "peft", ATTENTION)
    with pytest.raises(ValueError, match=r"does not load DoRA .*: megalora merge"):
        export(tmp_path / "peft", tmp_path / "out", engine=engine, base=str(bases["moe"]))
    with pytest.raises(AdapterInvalid, match="vLLM does not serve use_dora=True; .*merge"):
        check_adapter(tmp_path / "peft")
    said = describe(tmp_path / "peft")
    assert "does not load an adapter with use_dora" in said
    assert "no LoRA factor" not in said


def test_peft_is_refused_where_it_would_not_load(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of a model with experts it takes no DoRA on an MLP, which megalora trains and merges."""
    base = bases["shared"]
    lora = LoRAConfig(rank=2, target_modules=[r".*\.shared_expert\.down_proj"], use_dora=True)
    made = train(base, tmp_path / "adapter", lora)
    with pytest.raises(ValueError, match=r"DoRA on attention alone .*: megalora merge"):
        export(made.folder, tmp_path / "out", engine="peft", base=str(base))
    merge(made.folder, str(base), tmp_path / "merged")
    merged = read_weights(tmp_path / "merged")
    name = made.adapted[0].hf_module()
    whole = load_base(base).get_submodule(name).weight.double()
    a = made.factors[f"base_model.model.{name}.lora_A.weight"].double()
    b = made.factors[f"base_model.model.{name}.lora_B.weight"].double()
    m = made.factors[f"base_model.model.{name}.lora_magnitude_vector"].double()
    whole = whole + 32 / 2 * b @ a
    wanted = nn.functional.normalize(whole, dim=1) * m[:, None]
    torch.testing.assert_close(merged[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_section_of_an_import_trains_dora(bases: dict[str, Path], tmp_path: Path) -> None:
    of_peft(bases["moe"], tmp_path / "peft", ATTENTION)
    shape = shape_of(bases["moe"])
    adapted = read_adapter(tmp_path / "peft", shape).adapted
    section = lora_section(adapted, shape)
    assert section["use_dora"] is True
    assert settings(resolve(LoRAConfig(**section), shape)) == settings(adapted)


def without(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def flat(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][None]


def shorter(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][1:].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "lacks the magnitude of model.layers.0.self_attn.q_proj, and use_dora"),
        (flat, "this factor is a vector"),
        (shorter, "this base model and rank need"),
    ],
)
def test_bad_magnitudes_are_refused(
    change: Any, message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    of_peft(bases["moe"], tmp_path, ATTENTION)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector")
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert message in refusal(tmp_path, bases["moe"])


def test_magnitudes_without_the_option_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    of_peft(bases["moe"], tmp_path, ATTENTION)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"use_dora": False}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    said = refusal(tmp_path, bases["moe"])
    assert "has the magnitude of" in said and "use_dora in adapter_config.json is false" in said
