"""Read from the command line what users brought and could not use: adapters made elsewhere.

Each is made anew with stock PEFT, and what comes out must compute what PEFT computes with it.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.files import WEIGHTS
from megalora.cli import main as cli
from tests.adapters.adapters import logits
from tests.adapters.stock import check_equal, loaded_by_peft, new_adapter
from tests.adapters.weight_files import SHARDS, in_pickle, in_shards
from tests.named_tensors import without_parts
from tests.peft_warnings import IGNORED

pytestmark = IGNORED


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command and returns its exit code, what it printed, and the message of a refusal."""
    # Whoever debugs may have set it; it asks for a traceback where a line is expected here.
    monkeypatch.delenv("MEGALORA_TRACEBACK", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        # What PEFT printed while an adapter was made is not the command's.
        capfd.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, error = capfd.readouterr()
        assert "Traceback" not in error
        return code, out, error

    return run


@pytest.mark.parametrize("way", ["pickle", "shards"])
def test_adapter_files_elsewhere(said, tiny: Path, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "adapter"
    new_adapter(tiny, r=8, target_modules=["q_proj"]).save_pretrained(folder)
    expected = loaded_by_peft(folder, tiny)
    # torch's pickle, as PEFT wrote it before safetensors; shards, as it writes large adapters.
    {"pickle": in_pickle, "shards": in_shards}[way](folder)
    code, out, _ = said("inspect", folder)
    assert code == 0
    # Rank 8, 6 heads of 32 from 96 features, in 4 layers.
    assert "q_proj           8        192 x 96       4" in out
    assert said("import", folder, tmp_path / "out", "--base", tiny)[0] == 0
    check_equal(tmp_path / "out", tiny, expected)


def test_adapter_files_elsewhere_in_a_folder_of_its_own(said, tiny: Path, tmp_path: Path) -> None:
    """``save_pretrained`` of a model whose adapter is called math."""
    model = new_adapter(tiny, target_modules=["q_proj"])
    model.add_adapter("math", model.peft_config["default"])
    model.delete_adapter("default")
    # PEFT puts any adapter but "default" into a folder of its name, here adapter/math.
    model.save_pretrained(tmp_path / "adapter")
    code, _, error = said("inspect", tmp_path / "adapter")
    hint = "its sub-folder has, as PEFT saves an adapter with a name"
    assert code == 2
    assert f"{hint}: give {tmp_path}/adapter/math" in error
    assert said("inspect", tmp_path / "adapter" / "math")[0] == 0


def test_adapter_files_elsewhere_that_are_incomplete(said, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    new_adapter(tiny, target_modules=["q_proj"]).save_pretrained(folder)
    in_shards(folder)
    (folder / f"{SHARDS[0]}.safetensors").unlink()
    # Every command that reads an adapter: PEFT's own loader would leave the tensors out.
    commands = (
        ["inspect", folder],
        ["import", folder, tmp_path / "out", "--base", tiny],
        ["merge", folder, "--base", tiny, "--out", tmp_path / "out"],
        ["export", folder, tmp_path / "out"],
        ["verify", folder, "--base", tiny],
    )
    for command in commands:
        code, _, error = said(*command)
        assert code == 2
        assert error == (
            f"megalora: {folder}: 1 of 3 shards are missing ({SHARDS[0]}.safetensors); download the"
            " adapter again\n"
        )


def test_excluded_targets(said, tiny: Path, tmp_path: Path) -> None:
    model = new_adapter(tiny, r=8, target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"])
    model.save_pretrained(tmp_path / "adapter")
    # The config targets k_proj, and the file has nothing for it: that is what exclude_modules asks.
    code, out, _ = said("import", tmp_path / "adapter", tmp_path / "out", "--base", tiny)
    assert code == 0 and "adapts q_proj in layers 0-3\n" in out
    check_equal(tmp_path / "out", tiny, logits(model))


def test_excluded_targets_do_not_hide_a_loss(said, tiny: Path, tmp_path: Path) -> None:
    """v_proj is targeted and not excluded, and its tensors are gone."""
    folder = tmp_path / "adapter"
    targets = ["q_proj", "v_proj", "k_proj"]
    model = new_adapter(tiny, target_modules=targets, exclude_modules=["k_proj"])
    model.save_pretrained(folder)
    left = without_parts("v_proj")(load_file(folder / WEIGHTS))
    save_file(left, folder / WEIGHTS)
    code, _, error = said("import", folder, tmp_path / "out", "--base", tiny)
    assert code == 2
    assert "has no tensors for v_proj, which its config targets: they were lost" in error


def test_lm_head_adapter(said, tiny: Path, tmp_path: Path) -> None:
    model = new_adapter(tiny, r=8, target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    # PEFT stores the base's head, too, when it is adapted: 512 x 96 numbers that nobody trained.
    copy = "base_model.model.lm_head.base_layer.weight"
    assert copy in load_file(tmp_path / "adapter" / WEIGHTS)
    line = f"passed over, as it equals the base's: {copy}\n"
    for command in (
        ["import", tmp_path / "adapter", tmp_path / "imported", "--base", tiny],
        ["export", tmp_path / "adapter", tmp_path / "exported", "--base", tiny],
        ["merge", tmp_path / "adapter", "--base", tiny, "--out", tmp_path / "merged"],
    ):
        code, out, _ = said(*command)
        assert code == 0 and line in out
    for folder in ("imported", "exported"):
        assert copy not in load_file(tmp_path / folder / WEIGHTS)
        check_equal(tmp_path / folder, tiny, logits(model))
    code, out, _ = said("inspect", tmp_path / "adapter")
    said_of_copies = "weights of the base, not compared with it here (import, merge and export do)"
    assert code == 0
    assert f"{said_of_copies}: {copy}\n" in out


def test_lm_head_adapter_with_a_trained_head(said, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    name = "base_model.model.lm_head.base_layer.weight"
    new_adapter(tiny, target_modules=["lm_head"]).save_pretrained(folder)
    # As if the head had been trained beside its adapter: passing it over would lose that.
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {name: tensors[name] + 0.01 * torch.eye(512, 96)}, folder / WEIGHTS)
    code, _, error = said("merge", folder, "--base", tiny, "--out", tmp_path / "out")
    assert code == 2
    assert (
        f"{name} differs from lm_head.weight of {tiny}, by up to 0.01: it was trained, or" in error
    )


def test_shared_expert_gate_adapter(said, bases: dict[str, Path], tmp_path: Path) -> None:
    # "all-linear" takes the gate of the shared expert as well, a linear with one output.
    base = bases["shared"]
    adapter = tmp_path / "adapter"
    new_adapter(base, r=8, target_modules="all-linear").save_pretrained(adapter)
    code, _, error = said("import", adapter, tmp_path / "out", "--base", base)
    assert code == 2
    assert error.endswith(
        "model.layers.0.mlp.shared_expert_gate has an adapter; megalora does not adapt it. Merge it"
        " with PEFT (merge_and_unload), or train without it\n"
    )
    assert not (tmp_path / "out").exists()
    # Without it, all the rest is read.
    shutil.rmtree(adapter)
    excluded = ["shared_expert_gate"]
    model = new_adapter(base, r=8, target_modules="all-linear", exclude_modules=excluded)
    model.save_pretrained(adapter)
    check_equal(adapter, base, logits(model))
