"""The commands as a user types them: what they print and return."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.inspect import describe
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.lora.spec import tensor_name
from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape
from tests.command_outcome import outcome


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """Attention and experts of layers 2 and 3, B far from zero."""
    shape = model_shape(read_hf_config(tiny))
    adapted = resolve(LoRAConfig(rank=4, alpha=8.0, layers="2-"), shape)
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "adapter"
    trained = {}
    for a in adapted:
        for module in a.hf_modules():
            for factor in ("A", "B"):
                drawn = torch.randn(a.shape(factor), generator=generator)
                trained[tensor_name(module, factor)] = drawn / 10
    folder.mkdir()
    write_adapter(folder, adapted, shape, trained, str(tiny))
    return folder


# The first is megalora itself, without a command.
@pytest.mark.parametrize("command", [[], ["tiny"], ["train"], ["export"], ["verify"], ["inspect"]])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, err = outcome(capsys, *command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: {' '.join(['megalora', *command])} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "megalora: error: the following arguments are required: command"),
        (["trian"], "megalora: error: argument command: invalid choice: 'trian' (choose from "),
        (
            ["train"],
            (
                "megalora train: error: the following arguments are required: config,"
                " section.key=value"
            ),
        ),
        (
            ["train", "c.yaml", "--nproc", "two"],
            "megalora train: error: argument --nproc: invalid int value: 'two'",
        ),
        # Not argparse's own words: it would name all commands' usage.
        (
            ["train", "c.yaml", "--lr=3"],
            "megalora: megalora train: unknown argument '--lr=3'; see megalora train --help",
        ),
        (["verify", "a"], "megalora verify: error: the following arguments are required: --base"),
        (
            ["verify", "a", "--base", "b", "--engine", "tgi"],
            "megalora verify: error: argument --engine: invalid choice: 'tgi'",
        ),
        (
            ["inspect", "a", "b"],
            "megalora: megalora inspect: unknown argument 'b'; see megalora inspect --help",
        ),
        (
            ["tiny", "x", "--arch", "gpt2"],
            "megalora tiny: error: argument --arch: invalid choice: 'gpt2' (choose from"
            f" {', '.join(map(repr, FAMILIES))})",
        ),
        (
            ["tiny", "x", "--dtype", "int8"],
            "megalora tiny: error: argument --dtype: invalid choice: 'int8' (choose from 'float",
        ),
    ],
)
def test_wrong_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = outcome(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(message)


def test_tiny(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "base"
    options = ["--arch", "qwen3", "--seed", 5, "--dtype", "bfloat16"]
    assert outcome(capsys, "tiny", out, *options) == (0, f"wrote {out}\n", "")
    # The options reach make_tiny, which writes them down beside the model.
    assert json.loads((out / "megalora_tiny.json").read_text()) == {
        "arch": "qwen3", "seed": 5, "dtype": "bfloat16", "overrides": {},
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert (model.config.model_type, model.dtype) == ("qwen3", torch.bfloat16)


def test_export(
    adapter: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A checkpoint has this folder beside the adapter; an export leaves it out.
    out = tmp_path / "exported"
    (adapter / "training_state").mkdir()
    code, said, error = outcome(capsys, "export", adapter, out)
    assert (code, error) == (0, "")
    assert said == (
        f"wrote {out}; README.md in it says what it is and how to load it\n"
        "adapts q_proj in layers 2-3; k_proj in layers 2-3; v_proj in layers 2-3; o_proj in layers"
        " 2-3; gate_proj in layers 2-3; up_proj in layers 2-3; down_proj in layers 2-3\n"
        f"note: the card names the base {tiny}, a folder of this machine; --base OWNER/NAME names"
        " it for others\n"
    )
    assert sorted(path.name for path in out.iterdir()) == sorted(["README.md", CONFIG, WEIGHTS])
    # The head of a model card, as the hub reads it.
    assert (out / "README.md").read_text().startswith("---\nbase_model: ")
    # The adapter fits stock PEFT as it is, so that its files are copied.
    for name in (CONFIG, WEIGHTS):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()


def test_inspect(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "inspect", adapter) == (0, describe(adapter) + "\n", "")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_verify(adapter: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "verify", adapter, "--base", tiny)
    assert (code, out.splitlines()[-1]) == (0, "verified: stock PEFT computes the same model")

    # PEFT ignores an alpha for a name inside its fused experts; megalora applies it. Layer 2 is the
    # first that the adapter has.
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {"gate_proj": 40}}))
    code, out, _ = outcome(capsys, "verify", adapter, "--base", tiny)
    assert (code, out.splitlines()[-1]) == (
        1,
        "NOT the same model: they part from decoder layer 2 on",
    )

    # An adapter whose B is zero would agree with anything: that is no proof, so it is refused.
    (adapter / CONFIG).write_text(json.dumps(config))
    tensors = load_file(adapter / WEIGHTS)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()
    save_file(tensors, adapter / WEIGHTS)
    code, out, _ = outcome(capsys, "verify", adapter, "--base", tiny)
    assert (code, out.splitlines()[-1]) == (
        1,
        "the adapter does nothing: every logit is the base model's",
    )


@pytest.mark.parametrize("module", ["megalora", "megalora.train"])
def test_as_a_module(tmp_path: Path, module: str) -> None:
    arguments = ["train", "no.yaml"] if module == "megalora" else ["no.yaml"]
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    said = "megalora: no.yaml: no such config file\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
