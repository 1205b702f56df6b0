"""DoRA on some linears, plain LoRA on the others, and DoRA on routed experts: files, and what stock
PEFT makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.export import export
from megalora.adapters.files import CARD, CONFIG, PART_DORA, PARTS, WEIGHTS, parts_of
from megalora.adapters.inspect import describe
from megalora.adapters.merge import merge
from megalora.adapters.push import check_push
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.resumable import import_adapter
from megalora.chat.command import find_models
from megalora.config import LoRAConfig
from megalora.lora.section import lora_section, settings
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from megalora.verify.peft import verify_peft
from megalora.verify.stock_peft import load_by_peft
from tests.adapters.adapters import logits
from tests.adapters.merging import Trained, train, weight_of
from tests.adapters.merging import read as read_weights
from tests.adapters.stock import ATOL, base_model, refusal, shape_of
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = NAMES[:4]
IN_PARTS = LoRAConfig(rank=3, alpha=12.0, target_modules=[*NAMES, "lm_head"], use_dora=ATTENTION)
ON_EXPERTS = LoRAConfig(
    rank=3, alpha=12.0, target_modules=NAMES, use_dora=True, rank_pattern={"up_proj": 2},
    alpha_pattern={"up_proj": 8.0},
)  # fmt: skip
DOWN_ALONE = LoRAConfig(rank=2, alpha=6.0, target_modules=["q_proj", "down_proj"],
                        use_dora=["down_proj"])  # fmt: skip


def two_adapters(base: Path, out: Path) -> Any:
    """Stock PEFT's model of the two folders, as the card says how to load them."""
    lines = (out / CARD).read_text().split("```python\n")[1].split("\n```")[0].splitlines()
    code = [line for line in lines if "base =" not in line and "import" not in line]
    names: dict[str, Any] = {"PeftModel": PeftModel, "base": base_model(base)}
    exec("\n".join(code).replace(f'"{out.name}/', f'"{out}/'), names)
    return names["model"].eval()


def wanted_weight(made: Trained, a: Adapted, module: str, base: dict[str, Tensor]) -> Tensor:
    """The merged weight of one linear in float64, by the definition."""
    tensors = {}
    for factor in a.factors:
        end = "lora_magnitude_vector" if factor == "M" else f"lora_{factor}.weight"
        tensors[factor] = made.factors[f"base_model.model.{module}.{end}"].double()
    whole = weight_of(base, module).double() + a.scale * tensors["B"] @ tensors["A"]
    if "M" in tensors:
        whole = whole / whole.norm(dim=1, keepdim=True) * tensors["M"][:, None]
    return whole


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("moe", ON_EXPERTS),
        pytest.param("mixed packed", ON_EXPERTS, marks=pytest.mark.slow),
        pytest.param("moe packed", DOWN_ALONE, marks=pytest.mark.slow),
        pytest.param("shared", IN_PARTS, marks=pytest.mark.slow),
    ],
)
def test_merging_is_a_plain_loop_s(
    name: str, lora: LoRAConfig, mergeable: dict[str, Path], tmp_path: Path
) -> None:
    made = train(mergeable[name], tmp_path / "adapter", lora)
    merge(made.folder, str(mergeable[name]), tmp_path / "merged")
    before = read_weights(mergeable[name])
    merged = read_weights(tmp_path / "merged")
    num_dora = 0
    for a in made.adapted:
        for module in a.hf_modules():
            num_dora += "M" in a.factors
            found = weight_of(merged, module).double()
            wanted = wanted_weight(made, a, module, before)
            # Float32 rounds a weight of 1 at 6e-8, after a sum of three products.
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-6)
    assert num_dora


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("moe", {}),
        pytest.param("dense", {"use_dora": ["q_proj", "down_proj"]}, marks=pytest.mark.slow),
        pytest.param("moe", {"layers": "1-", "use_dora": [r"layers\.1\.self_attn\.q_proj"]},
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_peft_loads_the_two_folders_together(
    name: str, options: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[name]
    lora = LoRAConfig(**{"rank": 3, "alpha": 12.0, "target_modules": NAMES, "use_dora": ATTENTION,
                         **options})  # fmt: skip
    made = train(base, tmp_path / "adapter", lora)
    said = export(made.folder, tmp_path / "out", engine="peft", base=str(base)).text()
    assert "dora and plain, which PEFT loads together" in said
    merge(made.folder, str(base), tmp_path / "merged")
    expected = logits(base_model(tmp_path / "merged"))
    found = logits(two_adapters(base, tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    assert (expected - logits(base_model(base))).abs().max() > 0.1
    # Each is half of it alone.
    half = PeftModel.from_pretrained(base_model(base), str(tmp_path / "out" / "dora")).eval()
    assert (logits(half) - expected).abs().max() > 0.01
    # verify_peft loads them so, too.
    report = verify_peft(tmp_path / "out", str(base), atol=ATOL)
    assert report.ok
    # So does chat, which finds them by one name.
    assert find_models(str(tmp_path / "out"), str(base)) == (base, tmp_path / "out")
    ours = load_by_peft(base_model(base), tmp_path / "out")
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=ATOL)


def test_the_two_folders_come_back_as_one_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["moe"]
    made = train(base, tmp_path / "adapter", IN_PARTS)
    export(made.folder, tmp_path / "out", base=str(base))
    assert parts_of(tmp_path / "out")
    imported = import_adapter(tmp_path / "out", tmp_path / "checkpoint", str(base))
    assert imported.section["use_dora"] == ATTENTION
    assert settings(resolve(LoRAConfig(**imported.section), made.shape)) == settings(made.adapted)
    back = read_adapter(tmp_path / "checkpoint", made.shape)
    assert settings(back.adapted) == settings(made.adapted)
    for name, tensor in made.factors.items():
        assert torch.equal(back.tensors[name], tensor), name
    # Exported once more, the same two folders.
    export(tmp_path / "checkpoint", tmp_path / "again", base=str(base))
    for part in ("dora", "plain"):
        first = load_file(tmp_path / "out" / part / WEIGHTS)
        again = load_file(tmp_path / "again" / part / WEIGHTS)
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
    shown = describe(tmp_path / "out")
    assert "q_proj" in shown and "gate_proj" in shown


def test_a_checkpoint_of_both_is_not_taken_for_peft_s(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT would give the plain linears magnitudes of its own, in silence."""
    made = train(bases["dense"], tmp_path / "adapter", LoRAConfig(use_dora=["q_proj"]))
    assert json.loads((made.folder / CONFIG).read_text())["peft_type"] == PART_DORA
    with pytest.raises(KeyError, match=PART_DORA):
        PeftModel.from_pretrained(base_model(bases["dense"]), str(made.folder))
    with pytest.raises(ValueError, match=r"in two that it loads together: megalora export"):
        verify_peft(made.folder, str(bases["dense"]), atol=ATOL)
    with pytest.raises(ValueError, match=r"push its folders dora and plain"):
        check_push(made.folder, "owner/name", None)
    assert "some linears have DoRA" in describe(made.folder)


@pytest.mark.parametrize("engine", ["peft", None, "vllm"])
@pytest.mark.parametrize("lora", [ON_EXPERTS, DOWN_ALONE], ids=["all", "down"])
def test_dora_on_experts_is_refused_by_export(
    engine: Any, lora: LoRAConfig, bases: dict[str, Path], tmp_path: Path
) -> None:
    made = train(bases["moe"], tmp_path / "adapter", lora)
    with pytest.raises(ValueError, match=r"DoRA.*: megalora merge"):
        export(made.folder, tmp_path / "out", engine=engine, base=str(bases["moe"]))
    assert not (tmp_path / "out").exists()
    # What it is of stands in PEFT's own message.
    with pytest.raises((ValueError, KeyError), match="use_dora|LORA_PART_DORA"):
        PeftModel.from_pretrained(base_model(bases["moe"]), str(made.folder))


def test_dora_on_experts_is_imported_as_it_was(bases: dict[str, Path], tmp_path: Path) -> None:
    made = train(bases["moe"], tmp_path / "adapter", ON_EXPERTS)
    imported = import_adapter(made.folder, tmp_path / "checkpoint", str(bases["moe"]))
    assert imported.section["use_dora"] is True
    # Up's rank 2 was padded to gate's in the file, and is 2 again.
    assert settings(resolve(LoRAConfig(**imported.section), made.shape)) == settings(made.adapted)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_not_taken_for_the_whole(
    part: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["moe"]
    made = train(base, tmp_path / "adapter", IN_PARTS)
    export(made.folder, tmp_path / "out", base=str(base))
    alone = tmp_path / "alone" / part
    shutil.copytree(tmp_path / "out" / part, alone)
    said = "is a part of an adapter, which is dora, plain together"
    with pytest.raises(ValueError, match=said):
        export(alone, tmp_path / "half", base=str(base))
    with pytest.raises(ValueError, match=said):
        merge(alone, str(base), tmp_path / "merged")
    with pytest.raises(ValueError, match=said):
        import_adapter(tmp_path / "out" / part, tmp_path / "checkpoint", str(base))


def test_a_section_of_some_layers(bases: dict[str, Path]) -> None:
    shape = shape_of(bases["moe"])
    lora = LoRAConfig(
        target_modules=["q_proj", "v_proj", "up_proj"], layers="1-",
        use_dora=["v_proj", r"layers\.[12]\.self_attn\.q_proj", "up_proj"],
    )  # fmt: skip
    adapted = resolve(lora, shape)
    section = lora_section(adapted, shape)
    assert settings(resolve(LoRAConfig(**section), shape)) == settings(adapted)
    assert len(section["use_dora"]) == 3


def other_base(out: Path) -> None:
    config = json.loads((out / "plain" / CONFIG).read_text())
    (out / "plain" / CONFIG).write_text(
        json.dumps(config | {"base_model_name_or_path": "owner/other"})
    )


def twice(out: Path) -> None:
    shutil.copytree(out / "dora", out / "plain", dirs_exist_ok=True)


def swapped(out: Path) -> None:
    (out / "dora").rename(out / "kept")
    (out / "plain").rename(out / "dora")
    (out / "kept").rename(out / "plain")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_base, "dora and plain name different bases"),
        (twice, "of which the first should have DoRA"),
        (swapped, "of which the first should have DoRA"),
    ],
)
def test_folders_that_are_not_halves_are_refused(
    change: Any, message: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    made = train(bases["moe"], tmp_path / "adapter", IN_PARTS)
    export(made.folder, tmp_path / "out", base=str(bases["moe"]))
    change(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        import_adapter(tmp_path / "out", tmp_path / "checkpoint", str(bases["moe"]))


def test_an_expert_without_its_magnitude_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    made = train(bases["moe"], tmp_path / "adapter", ON_EXPERTS)
    tensors = load_file(made.folder / WEIGHTS)
    module = "model.layers.1.mlp.experts.3.down_proj"
    kept = {name: t for name, t in tensors.items() if f"{module}.lora_magnitude" not in name}
    save_file(kept, made.folder / WEIGHTS, metadata={"format": "pt"})
    assert f"lacks the magnitude of {module}" in refusal(made.folder, bases["moe"])
    kept = {name: t for name, t in tensors.items() if module not in name}
    save_file(kept, made.folder / WEIGHTS, metadata={"format": "pt"})
    num_experts = made.shape.num_experts
    few = f"down_proj of {num_experts - 1} of the {num_experts} experts in layer 1; with DoRA all"
    assert few in refusal(made.folder, bases["moe"])
