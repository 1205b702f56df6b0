"""What the command line answers to a user's mistakes: exit code 2 and one message, never a
traceback."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megalora.cli import main as cli
from megalora.model.families import FAMILIES
from megalora.train.__main__ import main as rank
from tests.refused_commands import Said, adapter, refused

__all__ = ["adapter", "refused"]  # fixtures

CHAT = (
    '{"messages": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]}\n'
)


@pytest.fixture
def refused_rank(refused: Said, tmp_path: Path, tiny: Path) -> Said:
    """Returns what a training rank answers, in a world of one; it may not have made its run
    folder."""
    (tmp_path / "chats.jsonl").write_text(CHAT * 4)
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tiny}, dtype: float32}}\ndata: {{train: {tmp_path}/chats.jsonl}}\n"
        f"train: {{steps: 1, global_batch_size: 4}}\ncheckpoint: {{dir: {tmp_path}/run}}\n"
    )

    def run(*overrides: str) -> str:
        said = refused(tmp_path / "run.yaml", *overrides, action=rank)
        assert not (tmp_path / "run").exists()
        return said

    return run


@pytest.fixture
def broken(tmp_path: Path, tiny: Path) -> Callable[..., Path]:
    """A copy of the tiny model that lacks the files of one pattern."""

    def make(missing: str) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(tiny, folder)
        (gone,) = folder.glob(missing)
        gone.unlink()
        return folder

    return make


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            # These ranks are alone, without torchrun, so that a world of one is all there is.
            ["parallel.tp=2"],
            (
                "1 ranks cannot hold the attention grid: tp=2 * cp=1 * pp=1 = 2, and 1 is not a"
                " multiple of 2.\n  Change parallel.tp or parallel.cp or parallel.pp, or launch a"
                " multiple of 2 ranks."
            ),
        ),
        (
            ["train.global_batch_size=5", "train.micro_batch_size=2"],
            (
                "train.global_batch_size=5 cannot be divided: micro_batch_size=2 * data parallel=1"
                " = 2, and 5 is not a multiple of 2.\n  Change train.global_batch_size or"
                " train.micro_batch_size."
            ),
        ),
        (
            ["parallel.sp=true"],
            "unknown config key parallel.sp; known keys: tp, pp, vpp, ep, etp, cp, stage_layers",
        ),
        (
            ["lora.target_modules=[q_proj,experts]"],
            (
                "lora.target_modules: 'experts' matches nothing in this model. Adaptable:"
                " down_proj, gate, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
            ),
        ),
        (["lora.layers=[2,4]"], "lora.layers: 4 is outside this model's layers 0-3"),
        (["model.path=/nowhere/tiny"], "model.path=/nowhere/tiny: no such folder"),
        (
            ["checkpoint.resume=/nowhere"],
            "checkpoint.resume=/nowhere is not a checkpoint: it has no training_state/state.json",
        ),
        (
            ["checkpoint.dir={folder}/chats.jsonl"],
            "checkpoint.dir={folder}/chats.jsonl is a file; choose a folder",
        ),
        (
            ["data.eval=4"],
            (
                "data.eval=4 would hold out 4 of the 4 samples of {folder}/chats.jsonl.\n"
                "  Choose between 1 and 3, or name another file."
            ),
        ),
        (
            ["data.train={folder}/none.jsonl"],
            (
                "{folder}/none.jsonl: no such file (looked in {folder}); correct data.train or"
                " data.eval"
            ),
        ),
        (
            # The chat template alone is longer than four tokens.
            ["data.max_length=4"],
            (
                "{folder}/chats.jsonl: none of the 4 samples is left: 4 longer than"
                " data.max_length=4 were left out (longest N).\n  Raise data.max_length, or set"
                " data.too_long to cut or split them."
            ),
        ),
    ],
)
def test_config(refused_rank: Said, tmp_path: Path, overrides: list[str], message: str) -> None:
    said = refused_rank(*[text.format(folder=tmp_path) for text in overrides])
    # How many tokens a chat has is the tokenizer's business.
    assert re.sub(r"longest \d+", "longest N", said) == message.format(folder=tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"tp": 4},
            (
                "parallel.tp=4 does not fit the model's 6 attention heads and 2 key/value heads; it"
                " can be one of 1, 2, 6"
            ),
        ),
        (
            {"ep": 3},
            "parallel.ep=3 does not divide the model's 8 experts; it can be one of 1, 2, 4, 8",
        ),
        (
            {"pp": 3},
            (
                "parallel.pp * vpp=3 does not divide the model's 4 layers; it can be one of 1, 2,"
                " 4, or set parallel.stage_layers=[1,2,1]"
            ),
        ),
    ],
)
def test_layout_that_does_not_divide_the_model(
    refused: Said, refused_rank: Said, tmp_path: Path, layout: dict[str, int], message: str
) -> None:
    # As many ranks as the layout needs, and 12 samples, which 3 and 4 ranks can share: nothing else
    # is wrong. ``refused_rank`` has written run.yaml.
    ((name, size),) = layout.items()
    batch = "train.global_batch_size=12"
    override = f"parallel.{name}={size}"
    said = refused("train", tmp_path / "run.yaml", "--nproc", size, batch, override)
    assert said == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [}', "3: not valid JSON (Expecting value, column 15)"),
        ("[1, 2]", "3: must be a JSON object, got list [1, 2]"),
    ],
)
def test_data_line_is_no_json(refused_rank: Said, tmp_path: Path, line: str, message: str) -> None:
    # CHAT ends with a line break of its own, so an empty line follows it: the bad one is the third.
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{CHAT}\n{line}\n{CHAT}")
    assert refused_rank(f"data.train={path}") == f"{path}:{message}"


def test_data_row_without_a_role(refused_rank: Said, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(CHAT + '{"messages": [{"from": "user", "content": "x"}]}\n')
    assert (
        refused_rank(f"data.train={path}")
        == f"{path}: row 2: message 1 has no 'role' (its keys: from, content); rename the key that"
        " says who speaks"
    )


def test_long_samples_are_left_out_and_counted(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chats.jsonl"
    long = json.loads(CHAT)
    # At least a token for each of 50 fours: more than max_length=40.
    long["messages"][1]["content"] = "4 " * 50
    path.write_text(CHAT * 4 + (json.dumps(long) + "\n") * 3)
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tiny}, dtype: float32}}\ndata: {{train: {path}, max_length: 40}}\n"
        "train: {steps: 1, global_batch_size: 4}\nlog: {tensorboard: false, progress: false}\n"
        f"checkpoint: {{dir: {tmp_path}/run}}\n"
    )
    cli.guarded(rank, [str(tmp_path / "run.yaml")])
    out = capfd.readouterr().out
    assert re.search(
        rf"train: {path}: 4 samples, \d+ tokens \(\d+ in the loss\); 3 longer than"
        r" data\.max_length=40 were left out "
        r"\(longest 1\d\d\)\n",
        out,
    )


def test_base_with_a_missing_shard(
    refused_rank: Said, refused: Said, adapter: Path, broken: Callable[..., Path]
) -> None:
    folder = broken("model-00002-of-*.safetensors")
    # Those that are left and the missing one.
    shards = len(list(folder.glob("*.safetensors"))) + 1
    message = (
        f"{folder}: 1 of {shards} weight shards are missing"
        f" (model-00002-of-0000{shards}.safetensors); download the model again"
    )
    assert refused_rank(f"model.path={folder}") == message
    assert refused("verify", adapter, "--base", folder) == message


def test_base_without_config(
    refused_rank: Said, refused: Said, adapter: Path, broken: Callable[..., Path]
) -> None:
    folder = broken("config.json")
    message = f"{folder} is not a Hugging Face model folder: it has no config.json"
    said = f"model.path={folder}: there is no config.json in this folder"
    assert refused_rank(f"model.path={folder}") == said
    assert refused("verify", adapter, "--base", folder) == message


def test_base_of_another_family(refused_rank: Said, tmp_path: Path) -> None:
    # Found out by the config alone, before weights are looked for.
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    message = f"model_type 'gpt2' is not supported; megalora knows {', '.join(FAMILIES)}"
    assert refused_rank(f"model.path={tmp_path}") == message
