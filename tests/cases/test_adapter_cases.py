"""Adapters made elsewhere that users brought and that could not be read, made anew with stock PEFT,
from the command line."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.files import WEIGHTS
from megalora.cli import main as cli
from tests.adapters.adapters import logits
from tests.adapters.stock import check_equal, loaded_by_peft, new_adapter
from tests.adapters.test_weights import SHARDS, in_pickle, in_shards
from tests.peft_warnings import IGNORED

pytestmark = IGNORED


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command and returns its exit code, what it printed, and the message of a refusal."""
    monkeypatch.delenv("MEGALORA_TRACEBACK", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
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
    {"pickle": in_pickle, "shards": in_shards}[way](folder)
    code, out, _ = said("inspect", folder)
    assert code == 0 and "q_proj           8        192 x 96       4" in out
    assert said("import", folder, tmp_path / "out", "--base", tiny)[0] == 0
    check_equal(tmp_path / "out", tiny, expected)


def test_adapter_files_elsewhere_in_a_folder_of_its_own(said, tiny: Path, tmp_path: Path) -> None:
    """``save_pretrained`` of a model whose adapter is called math."""
    model = new_adapter(tiny, target_modules=["q_proj"])
    model.add_adapter("math", model.peft_config["default"])
    model.delete_adapter("default")
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
    for command in (["inspect", folder], ["import", folder, tmp_path / "out", "--base", tiny],
                    ["merge", folder, "--base", tiny, "--out", tmp_path / "out"],
                    ["export", folder, tmp_path / "out"],
                    ["verify", folder, "--base", tiny]):  # fmt: skip
        code, _, error = said(*command)
        assert (code, error) == (
            2,
            (
                f"megalora: {folder}: 1 of 3 shards are missing ({SHARDS[0]}.safetensors); download"
                " the adapter again\n"
            ),
        )


def test_excluded_targets(said, tiny: Path, tmp_path: Path) -> None:
    model = new_adapter(tiny, r=8, target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"])
    model.save_pretrained(tmp_path / "adapter")
    code, out, _ = said("import", tmp_path / "adapter", tmp_path / "out", "--base", tiny)
    assert code == 0 and "adapts q_proj in layers 0-3\n" in out
    check_equal(tmp_path / "out", tiny, logits(model))


def test_excluded_targets_do_not_hide_a_loss(said, tiny: Path, tmp_path: Path) -> None:
    """v_proj is targeted and not excluded, and its tensors are gone."""
    folder = tmp_path / "adapter"
    new_adapter(
        tiny, target_modules=["q_proj", "v_proj", "k_proj"], exclude_modules=["k_proj"]
    ).save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    left = {name: tensor for name, tensor in tensors.items() if "v_proj" not in name}
    save_file(left, folder / WEIGHTS)
    code, _, error = said("import", folder, tmp_path / "out", "--base", tiny)
    assert (
        code == 2 and "has no tensors for v_proj, which its config targets: they were lost" in error
    )


def test_lm_head_adapter(said, tiny: Path, tmp_path: Path) -> None:
    model = new_adapter(tiny, r=8, target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "adapter")
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
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {name: tensors[name] + 0.01 * torch.eye(512, 96)}, folder / WEIGHTS)
    code, _, error = said("merge", folder, "--base", tiny, "--out", tmp_path / "out")
    assert (
        code == 2
        and f"{name} differs from lm_head.weight of {tiny}, by up to 0.01: it was trained, or"
        in error
    )


def test_shared_expert_gate_adapter(said, bases: dict[str, Path], tmp_path: Path) -> None:
    new_adapter(bases["shared"], r=8, target_modules="all-linear").save_pretrained(
        tmp_path / "adapter"
    )
    code, _, error = said(
        "import", tmp_path / "adapter", tmp_path / "out", "--base", bases["shared"]
    )
    assert code == 2 and error.endswith(
        "model.layers.0.mlp.shared_expert_gate has an adapter; megalora does not adapt it. Merge it"
        " with PEFT (merge_and_unload), or train without it\n"
    )
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "adapter")
    model = new_adapter(
        bases["shared"], r=8, target_modules="all-linear", exclude_modules=["shared_expert_gate"]
    )
    model.save_pretrained(tmp_path / "adapter")
    check_equal(tmp_path / "adapter", bases["shared"], logits(model))
