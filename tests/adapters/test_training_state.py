"""Export checkpoints as their training state has them: nothing is guessed from the zeros of the
adapter file, and files that contradict each other are refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.export import export
from megalora.adapters.files import CONFIG, OPTIMIZER, STATE_JSON, WEIGHTS
from megalora.adapters.resumable import import_adapter
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.section import settings
from megalora.lora.select import resolve
from megalora.lora.spec import tensor_name
from megalora.model.fields import model_shape
from megalora.train.loop import train as train_run
from tests.adapters.adapters import CASES, Trained, ranks_of, train
from tests.adapters.folders import assert_same_files, factors_of
from tests.distributed.ranks import run_ranks
from tests.named_tensors import cast
from tests.parity.runs import make_config

PADDED: dict[str, Any] = {
    "rank": 4, "alpha": 12.0, "target_modules": ["gate_proj", "up_proj", "q_proj"],
    "rank_pattern": {"gate_proj": 3}, "alpha_pattern": {"up_proj": 5.0},
}  # fmt: skip
"""What trains is narrower than its file, where gate's rank is padded, down is zeros and up's scale
is folded into B."""


def as_checkpoint(
    trained: Trained, options: dict[str, Any], masters: dict[str, Tensor], *, rows: bool = True
) -> Path:
    """Write the folder anew as training would from float32 ``masters``, in the dtype it has.

    ``rows``: say what is adapted; checkpoints of earlier versions have the config alone.
    """
    # All tensors have one.
    dtype = next(iter(trained.tensors.values())).dtype
    rounded = cast(dtype)(masters)
    write_adapter(trained.folder, trained.adapted, trained.shape, rounded, str(trained.base))
    state: dict[str, Any] = {
        "step": 3, "num_samples": 9, "world_size": 1,
        "config": {
            "model": {"dtype": "bfloat16"}, "data": {"train": "chats.jsonl"},
            "train": {"global_batch_size": 8, "lr": 1e-4, "schedule": "cosine"},
            "lora": asdict(LoRAConfig(**options)),
        },
    }  # fmt: skip
    if rows:
        state["adapted"] = settings(trained.adapted)
    # Adam's moments are left out: export needs the masters alone.
    (trained.folder / STATE_JSON).parent.mkdir(exist_ok=True)
    (trained.folder / STATE_JSON).write_text(json.dumps(state))
    params = {f"param.{name}": master for name, master in masters.items()}
    save_file(params, trained.folder / OPTIMIZER)
    return trained.folder


def unrounded(trained: Trained) -> dict[str, Tensor]:
    """Masters that bfloat16 does not hold, whose step is 2^-8 of a number; rounded they are the
    file's."""
    masters = {}
    for name, tensor in trained.tensors.items():
        masters[name] = tensor.float() * (1 + 2**-12)
    return masters


def assert_same_ranks(out: Path, trained: Trained) -> None:
    """An import of the export recognises the same ranks again."""
    imported = import_adapter(out, out.with_name("again"), str(trained.base))
    found = resolve(LoRAConfig(**imported.section), trained.shape)
    assert ranks_of(found) == ranks_of(trained.adapted)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "earlier version"])
# Eight of the cases of the MoE; test_import.py has all, and there masters are the file's numbers.
@pytest.mark.parametrize(("base", "options"), CASES[:22:3])
def test_export_of_a_checkpoint_is_its_file(
    bases: dict[str, Path], tmp_path: Path, base: str, options: dict[str, Any], rows: bool
) -> None:
    trained = train(bases[base], tmp_path / "checkpoint", torch.bfloat16, **options)
    folder = as_checkpoint(trained, options, unrounded(trained), rows=rows)
    # From the masters, which are rounded as training rounded them.
    export(folder, tmp_path / "first")
    assert_same_files(folder, tmp_path / "first")
    # And again from what was imported, where masters are the file's own numbers.
    import_adapter(tmp_path / "first", tmp_path / "imported", str(bases[base]))
    export(tmp_path / "imported", tmp_path / "second")
    assert_same_files(folder, tmp_path / "second")
    assert_same_ranks(tmp_path / "second", trained)


def test_a_trained_rank_of_zeros_is_no_padding(bases: dict[str, Path], tmp_path: Path) -> None:
    """Only the training state can tell: a file that was padded to one rank, as SGLang needs it, has
    the same zeros."""
    options = PADDED | {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}}
    options["alpha_pattern"] = {}
    trained = train(bases["moe"], tmp_path / "checkpoint", torch.bfloat16, **options)
    masters = unrounded(trained)
    # The last two of q's four ranks, in rows of A and columns of B.
    for layer in range(trained.shape.num_layers):
        a, b = factors_of(masters, f"model.layers.{layer}.self_attn.q_proj")
        a[2:].zero_()
        b[:, 2:].zero_()
    folder = as_checkpoint(trained, options, masters)
    found = export(folder, tmp_path / "out")
    assert {(a.name, a.rank) for a in found.facts.adapted} == {("q_proj", 4), ("o_proj", 2)}
    assert_same_files(folder, tmp_path / "out")


def test_stacked_exports_fold_scales_once(bases: dict[str, Path], tmp_path: Path) -> None:
    """From what was trained, not from the file, whose B's are folded and rounded already."""
    trained = train(bases["moe"], tmp_path / "checkpoint", torch.bfloat16, **PADDED)
    masters = unrounded(trained)
    folder = as_checkpoint(trained, PADDED, masters)
    # Stacked files have one scale for all experts, folded into B.
    export(folder, tmp_path / "out", layout="stacked")
    expected = tmp_path / "expected"
    expected.mkdir()
    rounded = cast(torch.bfloat16)(masters)
    write_adapter(
        expected, trained.adapted, trained.shape, rounded, str(trained.base), layout="stacked"
    )
    assert_same_files(expected, tmp_path / "out")


def change_values(folder: Path) -> None:
    """Edit one number of the adapter file."""
    tensors = load_file(folder / WEIGHTS)
    name = tensor_name("model.layers.1.mlp.experts.5.up_proj", "B")
    tensors[name][2, 1] += 0.5
    save_file(tensors, folder / WEIGHTS)


def change_alpha(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["lora_alpha"] *= 2
    (folder / CONFIG).write_text(json.dumps(config))


def lose_a_master(folder: Path) -> None:
    """Drop a tensor of the training state."""
    masters = load_file(folder / OPTIMIZER)
    del masters["param." + tensor_name("model.layers.0.self_attn.q_proj", "A")]
    save_file(masters, folder / OPTIMIZER)


def misshape_a_master(folder: Path) -> None:
    """Keep one of a factor's four ranks."""
    masters = load_file(folder / OPTIMIZER)
    name = "param." + tensor_name("model.layers.0.self_attn.q_proj", "A")
    masters[name] = masters[name][:1].clone()
    save_file(masters, folder / OPTIMIZER)


def name_another_model(folder: Path) -> None:
    """List a linear that Qwen3-MoE does not have, but Qwen3-Next does."""
    state = json.loads((folder / STATE_JSON).read_text())
    state["adapted"][0][0] = "model.layers.{layer}.linear_attn.q_proj"
    (folder / STATE_JSON).write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_values, r"experts.5.up_proj.lora_B.weight has other values in adapter_model"),
        (change_alpha, r"has another rank or scale in adapter_config.json"),
        (lose_a_master, r"optimizer.safetensors has no tensor param.*q_proj.lora_A"),
        (misshape_a_master, r"q_proj.lora_A.weight is \(1, 96\), and state.json says \(4, 96\)"),
        (name_another_model, r"this model has no model.layers.0.linear_attn.q_proj"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    bases: dict[str, Path], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    trained = train(bases["moe"], tmp_path / "checkpoint", torch.bfloat16, **PADDED)
    folder = as_checkpoint(trained, PADDED, unrounded(trained))
    change(folder)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_training_saved(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """On four ranks, in bfloat16: the masters rounded are the file, as saved and without rows."""
    # The second step moves A, and a learning rate of 1e-2 moves both beyond a step of bfloat16.
    config = make_config(
        tiny, chats, tmp_path / "run", {"tp": 2, "ep": 2}, lora=LoRAConfig(**PADDED),
        dtype="bfloat16", steps=2, lr=1e-2,
    )  # fmt: skip
    run_ranks(train_run, 4, config)
    checkpoint = tmp_path / "run" / "step_000002"
    found = export(checkpoint, tmp_path / "out")
    # Without the padding: gate was trained with rank 3, and down was not trained. All layers agree.
    ranks = {(a.name, a.rank) for a in found.facts.adapted}
    assert ranks == {("gate_proj", 3), ("up_proj", 4), ("q_proj", 4)}
    assert_same_files(checkpoint, tmp_path / "out")
    state = json.loads((checkpoint / STATE_JSON).read_text())
    adapted = resolve(config.lora, model_shape(read_hf_config(tiny)))
    assert state.pop("adapted") == settings(adapted)
    # As versions wrote it that did not say what is adapted: the config alone must do.
    (checkpoint / STATE_JSON).write_text(json.dumps(state))
    export(checkpoint, tmp_path / "earlier")
    assert_same_files(checkpoint, tmp_path / "earlier")
