"""What the command line answers to adapters that are broken, for another base, or not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.tiny import make_tiny
from tests.refused_commands import Said, adapter, refused

__all__ = ["adapter", "refused"]  # fixtures


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            # Names fit, sizes do not.
            {"hidden_size": 100},
            (
                "/adapter_model.safetensors:"
                " base_model.model.model.layers.0.mlp.experts.0.down_proj.lora_B.weight is (96, 3),"
                " but this base model and rank need (100, 3)"
            ),
        ),
        (
            # Every tensor of the adapter fits, but the ninth expert of 4 layers has none: gate, up
            # and down in each.
            {"num_experts": 9},
            (
                " lacks 12 linears of experts beside others of their layers, such as"
                " model.layers.0.mlp.experts.8.gate_proj; is it for another base? If not: PEFT and"
                " vLLM load whole layers, and megalora export writes zeros for what is missing"
            ),
        ),
        (
            # The adapter is for one layer more than there is.
            {"num_hidden_layers": 3},
            (
                "/adapter_model.safetensors: model.layers.3.mlp.experts.0.down_proj is not a linear"
                " layer of this base model; the nearest is model.layers.2.mlp.experts.0.down_proj"
            ),
        ),
    ],
)
def test_adapter_for_another_base(
    refused: Said, adapter: Path, tmp_path: Path, sizes: dict[str, Any], message: str
) -> None:
    other = make_tiny(tmp_path / "other", **sizes)
    assert refused("verify", adapter, "--base", other) == f"{adapter}{message}"


def test_no_adapter(refused: Said, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, says in (
        (
            "nowhere",
            "is not a folder; name one with adapter_config.json and adapter_model.safetensors",
        ),
        ("empty", "is not an adapter folder: it has no adapter_config.json"),
    ):
        folder = tmp_path / name
        message = f"{folder} {says}"
        assert refused("inspect", folder) == message
        assert refused("verify", folder, "--base", tiny) == message
        assert refused("export", folder, tmp_path / "out") == message
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_method(refused: Said, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"peft_type": "IA3"}))
    assert (
        refused("inspect", adapter)
        == f"{adapter / CONFIG}: peft_type is 'IA3'; megalora reads LORA only"
    )


# Nothing; less than the 8 bytes that give the header's length; a part of the header; all but the
# last numbers.
@pytest.mark.parametrize("keep", [0, 7, 1000, -16])
def test_truncated_weights(refused: Said, adapter: Path, tiny: Path, keep: int) -> None:
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    for arguments in (["inspect", adapter], ["verify", adapter, "--base", tiny]):
        assert refused(*arguments).startswith(f"{path} is not a whole safetensors file (")


def test_weights_are_not_there(refused: Said, adapter: Path, tmp_path: Path) -> None:
    (adapter / WEIGHTS).unlink()
    for arguments in (["inspect", adapter], ["export", adapter, tmp_path / "out"]):
        assert refused(*arguments) == f"{adapter} is not an adapter folder: it has no {WEIGHTS}"


def test_export_over_something(refused: Said, adapter: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    assert (
        refused("export", adapter, taken)
        == f"{taken} exists and is not an empty folder; choose another"
    )
    # Somebody's work is still there, and nothing of ours beside it.
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]
