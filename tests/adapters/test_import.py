"""Import adapters as checkpoints that training resumes: what was trained is recognised behind
padding and folded scales, and an export of it is the same file, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.export import export
from megalora.adapters.files import LORA_SECTION, STATE_JSON, WEIGHTS
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.resumable import import_adapter
from megalora.adapters.trained import trained_form
from megalora.config import LoRAConfig
from megalora.config.file import load_config
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted, tensor_name
from tests.adapters.adapters import CASES, EXPERTS, ranks_of, train
from tests.adapters.folders import assert_same_files, factors_of, remove_tensors
from tests.adapters.stock import loaded_by_peft, read_logits
from tests.peft_warnings import IGNORED
from tests.whole_state import whole_state

pytestmark = IGNORED


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
    # In bfloat16 a scale folded twice, or masters rounded twice, would change bits.
    trained = train(bases[base], tmp_path / "checkpoint", torch.bfloat16, **options)
    export(trained.folder, tmp_path / "first", layout=layout)
    import_adapter(tmp_path / "first", tmp_path / "imported", str(bases[base]))
    export(tmp_path / "imported", tmp_path / "second", layout=layout)
    assert_same_files(tmp_path / "first", tmp_path / "second")
    # A checkpoint has the layout per_expert itself.
    if layout == "per_expert":
        assert_same_files(trained.folder, tmp_path / "first")


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
    state = whole_state(tmp_path / "imported")
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
    # The expert's A has as many rows as its rank.
    said = "2 rows of A are zeros (1 of 8 linears whole); drawn anew, B zero"
    assert said in "\n".join(imported.notes)
    masters = whole_state(tmp_path / "imported")
    module = "model.layers.1.mlp.experts.5.down_proj"
    a = masters[f"param.{tensor_name(module, 'A')}"]
    b = masters[f"param.{tensor_name(module, 'B')}"]
    # Where both were zero, neither would ever get a gradient.
    assert a.any(1).all()
    assert not b.any()
    # With B zero the model is still the one that was imported.
    after = loaded_by_peft(tmp_path / "imported", bases["moe"])
    _, before = read_logits(trained.folder, bases["moe"])
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5)


def test_what_an_import_writes(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj", *EXPERTS])
    imported = import_adapter(trained.folder, tmp_path / "imported", str(bases["moe"]))
    state = json.loads((tmp_path / "imported" / STATE_JSON).read_text())
    # Training goes on from step 0: an adapter has no optimizer state.
    assert state["step"] == 0 and state["imported_from"] == str(trained.folder)
    # The section as a file, for the user to paste into the config of the run that goes on.
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {bases['moe']}}}\ndata: {{train: x.jsonl}}\ntrain: {{steps: 1}}\n"
        + (tmp_path / "imported" / LORA_SECTION).read_text()
    )
    assert load_config(config).lora == LoRAConfig(**imported.section)
    assert f"checkpoint.resume={tmp_path / 'imported'}" in imported.text()


def test_an_adapter_that_does_nothing_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])
    tensors = load_file(trained.folder / WEIGHTS)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.zero_()
    save_file(tensors, trained.folder / WEIGHTS)
    # As after zero steps, or after a run whose adapter got no gradient.
    message = "every B is zero: this adapter does nothing"
    with pytest.raises(ValueError, match=message):
        export(trained.folder, tmp_path / "exported")
    with pytest.raises(ValueError, match=message):
        import_adapter(trained.folder, tmp_path / "imported", str(bases["moe"]))


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
