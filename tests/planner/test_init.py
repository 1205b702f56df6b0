"""Check ``megalora init``: the file that it writes runs, explains each option in the words of
docs/options.md, and has the layout that the planner chooses."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from megalora.cli.main import main
from megalora.config import ParallelConfig, RecomputeLayers, RunConfig
from megalora.config.commented import FILL_IN, commented_yaml, one_line
from megalora.config.file import load_config
from megalora.model.fields import model_shape
from megalora.planner import init_command
from megalora.planner.first_values import Draft, fit_to_data, read_draft, with_max_length
from megalora.planner.gpus import find_machine
from megalora.planner.init_command import num_nodes
from megalora.planner.layouts import Workload
from megalora.planner.models import find_architecture
from megalora.planner.packing import packing_of
from megalora.planner.search import search
from tests.jsonl import read_jsonl, write_jsonl
from tests.minimal_config import MINIMAL

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^(?:  # (?P<comment>.+)|(?P<section>\w+):|  (?P<key>\w+): .+)$")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in an empty folder, and returns what it prints and the file's text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGALORA_CACHE", str(tmp_path / "cache"))

    def called(*arguments: object) -> tuple[str, str]:
        main(["init", *map(str, arguments)])
        return capsys.readouterr().out, (tmp_path / "run.yaml").read_text()

    return called


def explained(text: str) -> dict[str, str]:
    """The comment above each ``section.key`` of a file."""
    found = {}
    section = comment = ""
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        comment = match["comment"] or comment
        section = match["section"] or section
        if match["key"]:
            found[f"{section}.{match['key']}"] = comment
            comment = ""
    return found


def meanings() -> dict[str, str]:
    """The meaning of each option in docs/options.md."""
    page = (ROOT / "docs/options.md").read_text()
    found = {}
    for name, rest in re.findall(r"^\| `(\w+\.\w+)` \|(.*) \|$", page, re.MULTILINE):
        found[name] = rest.rpartition(" | ")[2].replace("`", "").replace("\\|", "|")
    return found


def test_the_file_has_the_planner_s_layout_and_explains_every_option(
    run: Any, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    said, text = run("--model", tiny, "--data", chats, "--gpus", 4)
    config = load_config(tmp_path / "run.yaml")
    config.check_world(4)
    # An own search, of the machine, the lengths and the batch that the file names.
    work = replace(Workload.of(config, 1.2), packing=packing_of(config, None))
    shape = model_shape(find_architecture(str(tiny)))
    best = search(shape, config.lora, 4, work, find_machine("h100")).best()
    assert config.parallel == best.layout.parallel
    assert config.train.micro_batch_tokens == best.layout.micro_batch_tokens is not None
    assert config.train.recompute == best.layout.recompute
    head = text.partition("\n\n")[0].replace("\n#", "")
    assert f"Layout: {best.layout}" in head and "Why: " in head
    assert f"memory of the fullest rank {best.memory.peak_bytes / 2**30:.1f} GiB" in head
    low, high = best.limits
    assert f"a step {low:.3g}-{high:.3g}? s" in head
    assert "megalora train run.yaml --nproc 4" in head and "megalora train run.yaml" in said
    # Every option has a comment: the beginning of what the page says of it.
    comments = explained(text)
    named = set()
    for section, options in yaml.safe_load(text).items():
        named |= {f"{section}.{key}" for key in options}
    assert comments.keys() == named
    assert named >= {
        "model.path", "data.train", "data.max_length", "parallel.tp", "parallel.ep", "lora.rank",
        "lora.alpha", "train.lr", "train.epochs", "train.global_batch_size", "train.recompute",
        "train.micro_batch_tokens", "checkpoint.dir", "checkpoint.every", "log.every",
    }  # fmt: skip
    pages = meanings()
    for name, comment in comments.items():
        assert len(comment) > 10 and pages[name].startswith(comment.removesuffix(" ...")), name
    assert max(map(len, text.splitlines())) <= 100


def test_values_follow_from_the_data(run: Any, tiny: Path, chats: Path, tmp_path: Path) -> None:
    _, text = run("--model", tiny, "--data", chats)
    config = load_config(tmp_path / "run.yaml")
    # Lengths by transformers itself.
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    lengths = []
    for row in read_jsonl(chats):
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        lengths.append(len(ids))
    assert f"Data: 96 samples of {min(lengths)} to {max(lengths)} tokens" in text
    assert config.data.max_length == -(-max(lengths) // 64) * 64
    # 91 are trained on, which are 11 steps of 8 and fewer than 10 of 16.
    assert (config.data.eval, config.train.global_batch_size, config.train.warmup) == (0.05, 8, 0)
    assert config.checkpoint.dir == "runs/chats"


def test_pairs_of_answers_are_read_as_pairs(run: Any, tiny: Path, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Why?"}]
    rows = []
    for words in range(1, 31):
        texts = {"chosen": "so " * words, "rejected": "no " * (40 - words)}
        rows.append({"prompt": asked} | {
            name: [{"role": "assistant", "content": text.strip()}] for name, text in texts.items()
        })  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    run("--model", tiny, "--data", "pairs.jsonl", "objective.name=dpo")
    config = load_config(tmp_path / "run.yaml")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    longest = 0
    for row in rows:
        for name in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(asked + row[name], return_dict=False)
            longest = max(longest, len(ids))
    assert config.objective.name == "dpo"
    assert longest <= config.data.max_length < longest + 64


def draft(*overrides: str, data: str | None = None) -> Draft:
    return read_draft("Qwen/Qwen3-30B-A3B", data, overrides)


def test_one_long_sample_does_not_decide_and_the_model_s_positions_limit() -> None:
    # One of 1,000 is 0.1 %: left out, and said.
    found = with_max_length(draft(), [100] * 999 + [9000])
    assert found.config.data.max_length == 128
    assert found.notes[0].endswith("; 1 are longer than data.max_length=128 (data.too_long)")
    # Of two of them one must fit.
    assert with_max_length(draft(), [100] * 998 + [8000, 9000]).config.data.max_length == 8000
    # Qwen3-30B-A3B has 40,960 positions.
    assert with_max_length(draft(), [10**6]).config.data.max_length == 40960
    # What the user says stays.
    given = with_max_length(draft("data.max_length=512"), [100] * 9 + [600])
    assert given.config.data.max_length == 512 and "1 are longer" in given.notes[0]


@pytest.mark.parametrize(
    ("gpus", "overrides", "batch", "warmup"),
    [
        (8, [], 64, 10),
        (6, [], 66, 10),
        (96, [], 96, 10),
        (8, ["train.global_batch_size=24"], 24, 10),
        (8, ["train.steps=100"], 64, 5),
        (8, ["train.steps=7"], 64, 0),
        (8, ["train.steps=7", "train.warmup=3"], 64, 3),
    ],
)
def test_batch_and_warm_up_fit_gpus_and_steps(
    gpus: int, overrides: list[str], batch: int, warmup: int
) -> None:
    train = fit_to_data(draft(*overrides), gpus).config.train
    assert (train.global_batch_size, train.warmup) == (batch, warmup)
    # One of the two, or the run would say that epochs do not count.
    assert (train.epochs is None) == (train.steps is not None)


def test_the_command_line_s_layout_is_kept(run: Any, tiny: Path, chats: Path) -> None:
    given = ["parallel.ep=2", "train.micro_batch_size=4", "model.dtype=float32"]
    said, text = run("--model", tiny, "--data", chats, "--gpus", 2, *given)
    tree = yaml.safe_load(text)
    assert (tree["parallel"]["ep"], tree["train"]["micro_batch_size"]) == (2, 4)
    assert "micro_batch_tokens" not in tree["train"]
    assert "Why: the command line gives it." in text
    # Rates are those of bfloat16, which the file says.
    assert "so that float32 takes longer" in " ".join(text.replace("\n#", "").split())
    assert " ep=2 etp=1 edp=1 micro=4 recompute=off" in said


def test_a_template_says_what_to_fill_in(run: Any, chats: Path, tmp_path: Path) -> None:
    said, text = run("--gpus", 16)
    marked = [line for line in text.splitlines() if line.endswith("# <-- fill in")]
    assert marked == [f"  {key}: '{FILL_IN}'  # <-- fill in" for key in ("path", "train")]
    assert "fill in model.path and data.train" in said and "is not planned" in text
    # 16 GPUs are two nodes.
    assert "NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC_PER_NODE=8" in text
    file = tmp_path / "run.yaml"
    with pytest.raises(
        ValueError, match=r"run.yaml: (model.path|data.train) is \?\?\?: fill it in"
    ):
        load_config(file)
    filled = load_config(file, ["model.path=base", f"data.train={chats}"])
    assert (filled.model.path, filled.data.train) == ("base", str(chats))
    filled.check_world(16)


def test_a_model_without_data_is_planned(run: Any) -> None:
    # 30 billion parameters do not fit one GPU of 24 GB.
    with pytest.raises(SystemExit):
        run("--model", "Qwen/Qwen3-30B-A3B", "--gpu", "rtx4090")
    assert not Path("run.yaml").exists()
    said, text = run("--model", "Qwen/Qwen3-30B-A3B", "--gpu", "h200", "--gpus", 1)
    assert "fill in data.train" in said and "Predicted" in text
    assert yaml.safe_load(text)["model"]["path"] == "Qwen/Qwen3-30B-A3B"


def test_a_file_that_came_meanwhile_is_not_overwritten(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> Draft:
        (tmp_path / "run.yaml").write_text("mine")
        return fit_to_data(*arguments)

    monkeypatch.setattr(init_command, "fit_to_data", slow)
    with pytest.raises(FileExistsError):
        init_command.init_command(
            init_command.InitOptions(None, None, 1, "h100", None, Path("run.yaml")), []
        )
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_whatever_a_config_holds_is_read_back_equal(tmp_path: Path) -> None:
    (tmp_path / "minimal.yaml").write_text(MINIMAL)
    config: RunConfig = load_config(
        tmp_path / "minimal.yaml",
        ["data.train=[{path: 'a, b.jsonl', weight: 2}, {path: '#c.jsonl', weight: 0.5}]"],
    )
    odd = replace(
        config,
        parallel=ParallelConfig(pp=4, stage_layers=(23, 24, 24, 23)),
        train=replace(
            config.train, lr=1e-5, recompute=RecomputeLayers(layers=12, rest="selective")
        ),
        lora=replace(config.lora, target_modules=["q_proj", r"layers\.(0|1): .*"], layers="0-3"),
        checkpoint=replace(config.checkpoint, dir="läufe/on: 'x' [1]"),
        log=replace(config.log, samples=["What is 6 times 7?", "é, {b}"]),
    )
    for always in ({}, init_command.WRITTEN):
        text = commented_yaml(odd, always)
        (tmp_path / "odd.yaml").write_text(text, encoding="utf-8")
        assert load_config(tmp_path / "odd.yaml") == odd
        assert "stage_layers: [23, 24, 24, 23]" in text


def test_comments_are_whole_sentences_as_far_as_they_fit() -> None:
    text = (
        "Names (a ... b) of ``x``. 0 is none. ``off``: a very long sentence about nothing at all."
    )
    assert one_line(text, 50) == "Names (a ... b) of x. 0 is none."
    assert one_line(text, 25) == "Names (a ... b) of x."
    assert one_line(text, 16) == "Names (a ... ..."
    assert one_line(text, 90) == text.replace("``", "")


def test_nodes_have_equal_numbers_of_gpus() -> None:
    for num_gpus in range(1, 200):
        nodes = num_nodes(num_gpus, 8)
        fewer = [n for n in range(1, nodes) if num_gpus % n == 0 and num_gpus // n <= 8]
        assert num_gpus % nodes == 0 and num_gpus // nodes <= 8 and not fewer


@pytest.mark.slow
def test_a_file_for_one_gpu_trains_on_this_cpu(
    run: Any, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    run("--model", tiny, "--data", chats, "--gpus", 1, "train.steps=3", "train.lr=1e-2")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-m", "megalora", "train", "run.yaml"], cwd=tmp_path, env=env, check=True
    )
    lines = (tmp_path / "runs/chats/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert len(losses) >= 3 and losses[2] < losses[0]
    assert (tmp_path / "runs/chats/step_000003/adapter_model.safetensors").is_file()
