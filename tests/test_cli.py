"""The commands as a user types them: what they start, print and return."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModelForCausalLM

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.inspect import describe
from megalora.adapters.write.form import write_adapter
from megalora.cli import main as cli
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.lora.spec import tensor_name
from megalora.model.families import FAMILIES
from megalora.model.fields import model_shape


def outcome(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``megalora ARGUMENTS``."""
    # Nothing that was printed before counts.
    capsys.readouterr()
    code: Any = 0
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def run_yaml(tiny: Path, tmp_path: Path) -> Path:
    """A config without mistakes, whose data are looked for but not read before ranks start."""
    path = tmp_path / "run.yaml"
    (tmp_path / "chats.jsonl").touch()
    path.write_text(
        f"model: {{path: {tiny}}}\ndata: {{train: {tmp_path}/chats.jsonl}}\ntrain: {{steps: 3,"
        " global_batch_size: 8}\n"
    )
    return path


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


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What ``megalora train`` hands to torchrun instead of running it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(torch_run, "main", calls.append)
    return calls


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
            f"megalora: arch 'gpt2' is unknown; choose one of {', '.join(FAMILIES)}.",
        ),
        (
            ["tiny", "x", "--dtype", "int8"],
            "megalora: dtype 'int8' is unknown; choose one of float32, bfloat16.",
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


def test_train_starts_torchrun(
    run_yaml: Path,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # torchrun warns where it sets this to 1 itself.
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    arguments = ["train", run_yaml, "train.lr=0.5", "--nproc", 4, "parallel.ep=2", "train.lr=0.25"]
    assert outcome(capsys, *arguments) == (0, "", "")
    # Overrides in their order, of which the last one wins, wherever options of ours stand between.
    assert started == [
        ["--standalone", "--nproc-per-node", "4", "--max-restarts", "0", "-m", "megalora.train",
         str(run_yaml),
         "train.lr=0.5", "parallel.ep=2", "train.lr=0.25"]
    ]  # fmt: skip
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_train_keeps_the_number_of_threads_it_is_given(
    run_yaml: Path,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    outcome(capsys, "train", run_yaml)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert started[0][:3] == ["--standalone", "--nproc-per-node", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lrr=1"], "unknown config key train.lrr; did you mean train.lr?"),
        (["--nproc", "0"], "a run needs at least 1 rank, got 0"),
        (
            ["--nproc", "3", "parallel.ep=2"],
            (
                "3 ranks cannot hold the expert grid: etp=1 * ep=2 * pp=1 = 2, and 3 is not a"
                " multiple of 2.\n  Change parallel.etp or parallel.ep or parallel.pp, or launch a"
                " multiple of 2 ranks."
            ),
        ),
        (
            ["--nproc", "4", "parallel.tp=4"],
            (
                "parallel.tp=4 does not fit the model's 6 attention heads and 2 key/value heads; it"
                " can be one of 1, 2, 6"
            ),
        ),
        (
            ["lora.target_modules=[q_porj]"],
            (
                "lora.target_modules: 'q_porj' matches nothing in this model; did you mean q_proj?"
                " Adaptable: down_proj, gate, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj,"
                " v_proj"
            ),
        ),
    ],
)
def test_train_finds_mistakes_before_ranks_start(
    run_yaml: Path,
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert outcome(capsys, "train", run_yaml, *arguments) == (2, "", f"megalora: {message}\n")
    assert not started


def test_train_leaves_a_model_on_the_hub_to_the_ranks(
    run_yaml: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    # Its config is not on this machine, so that the mistake in the second cannot be seen yet.
    overrides = ["model.path=Qwen/Qwen3-30B-A3B", "lora.target_modules=[q_porj]"]
    assert outcome(capsys, "train", run_yaml, *overrides) == (0, "", "")
    assert len(started) == 1


def failure(exitcode: int) -> ChildFailedError:
    """What torchrun raises when rank 1, process 77, ends so."""
    return ChildFailedError("megalora.train", {1: ProcessFailure(1, 77, exitcode, "<N/A>")})


def test_a_mistake_of_the_ranks_is_not_reported_twice(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rank that ends with 2 has said its mistake.
    def fail(_: list[str]) -> None:
        raise failure(exitcode=2)

    monkeypatch.setattr(torch_run, "main", fail)
    assert outcome(capsys, "train", run_yaml) == (2, "", "")


def test_a_crash_of_the_ranks_is_torchrun_s_to_report(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Killed: no rank can have said anything.
    def fail(_: list[str]) -> None:
        raise failure(exitcode=-9)

    monkeypatch.setattr(torch_run, "main", fail)
    with pytest.raises(ChildFailedError, match="Signal 9"):
        cli.main(["train", str(run_yaml)])


def test_ranks_report_one_mistake_once(tmp_path: Path) -> None:
    """Through a real torchrun, which would end rank 0 as soon as rank 1 has left."""
    arguments = ["--standalone", "--nproc-per-node", "2", "-m", "megalora.train", "no.yaml"]
    start = f"from megalora.cli.main import torchrun; torchrun({arguments})"
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True
    )
    said = "megalora: no.yaml: no such config file\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def mistaken(_: list[str]) -> None:
    raise ValueError("wrong\n  Do this.")


def test_a_rank_that_is_mistaken_alone_speaks_after_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 speaks for all at once. Another waits half a minute, in which rank 0 would have made
    the same mistake and torchrun would have ended them all."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank, patience, said in (("0", [], "megalora: "), ("3", [30], "megalora (rank 3): ")):
        waited.clear()
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            cli.guarded(mistaken, [])
        assert (caught.value.code, waited) == (2, patience)
        assert capsys.readouterr().err == f"{said}wrong\n  Do this.\n"


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"):
        cli.guarded(mistaken, [])


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        cli.guarded(lambda _: {}["bug"], [])  # type: ignore[index]


def test_export(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A checkpoint has this folder beside the adapter; an export leaves it out.
    out = tmp_path / "exported"
    (adapter / "training_state").mkdir()
    code, said, error = outcome(capsys, "export", adapter, out)
    assert (code, error) == (0, "")
    assert said == (
        f"wrote {out}; README.md in it says what it is and how to load it\n"
        "adapts q_proj in layers 2-3; k_proj in layers 2-3; v_proj in layers 2-3; o_proj in layers"
        " 2-3; gate_proj in layers 2-3; up_proj in layers 2-3; down_proj in layers 2-3\n"
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


def test_train_without_a_config_says_how_it_is_called(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megalora.train"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "megalora: usage: torchrun --nproc-per-node N -m megalora.train CONFIG.yaml"
        " [section.key=value ...]\n"
    )
