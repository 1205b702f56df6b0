"""Check that mistakes in options, paths and folders are found before torch is imported: in a
process that cannot import it, each of these commands ends with its one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megalora
from tests.minimal_config import MINIMAL

# Each of these takes seconds to import. None in its place makes an import fail at once.
SCRIPT = """
import contextlib, io, json, sys
for name in ("torch", "transformers", "megatron", "peft", "datasets"):
    sys.modules[name] = None
from megalora.cli import main
from megalora.train.__main__ import main as rank
from megalora.user_error import guarded
said = []
for arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if arguments[0] == "rank":
                guarded(rank, arguments[1:])
            else:
                main.main(arguments)
        except SystemExit as ended:
            code = ended.code
        except Exception as error:
            code = repr(error)
    said.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(said))
"""
BASE = ["--base", "base"]
NEW = ["--out", "new.yaml"]
NOT_AN_ADAPTER = "is not an adapter folder: it has no adapter_config.json"
RL = ["rl", "run.yaml", "objective.name=grpo", "train.steps=8", "train.global_batch_size=8"]
NODES = ["train", "run.yaml", "checkpoint.snapshots.every=1", "--max-restarts", "1", "--nnodes"]
REPLICATE = "checkpoint.snapshots.replicate=2"
# Arguments after ``megalora``, or after ``rank`` those of a rank, and what is said. The working
# directory is ``folder`` below.
WRONG: list[tuple[list[str], str]] = [
    (["train", "none.yaml"], "none.yaml: no such config file"),
    (["train", "run.yaml", "train.lr=fast"], "train.lr must be a number, got 'fast'"),
    (["train", "run.yaml", "data.train=none.jsonl"], "none.jsonl: no such file (looked in"),
    (["train", "run.yaml", "data.train=[]"], "data.train is an empty list; name a source"),
    (["train", "run.yaml", "data.train=''"], "data.train is empty; name a file or a folder"),
    (["train", "run.yaml", "data.train=7"], "data.train must be text or a list of mappings"),
    (["train", "run.yaml", "data.train=[{path: a.jsonl, weight: .nan}]"], "the weight of a.jsonl"),
    (["train", "run.yaml", "model.path=./none"], "model.path=./none: no such folder"),
    (["train", "run.yaml", "model.path=empty"], "model.path=empty: there is no config.json"),
    (["train", "run.yaml", "checkpoint.dir=a.jsonl"], "checkpoint.dir=a.jsonl is a file; choose"),
    (["train", "run.yaml", "checkpoint.resume=empty"], "checkpoint.resume=empty is not a check"),
    (["train", "run.yaml", "checkpoint.resume=stale"], "stale/latest names step_000009, which"),
    (["train", "run.yaml", "--nproc", "3", "parallel.ep=2"], "3 ranks cannot hold the "),
    (["train", "run.yaml", "--nnodes", "2"], "--nnodes and --meet are for runs with checkpoint.s"),
    ([*NODES, "2"], "--nnodes 2 and --meet None: several nodes need both"),
    ([*NODES, "0", "--meet", "a:1"], "--nnodes 0 and --meet a:1: several nodes need both"),
    ([*NODES, "2", "--meet", "node-a"], "--meet 'node-a' is not HOST:PORT: give the name of one"),
    ([*NODES, "2", "--meet", "a:99999"], "--meet 'a:99999' is not HOST:PORT"),
    ([*NODES, "2", "--meet", "a:1", "--node-wait", "0"], "--node-wait must be more than 0 seconds"),
    ([*NODES, "2", "--meet", "a:1"], "MEGALORA_TOKEN is not set: nodes know each other by it"),
    ([*NODES, "1", REPLICATE], "checkpoint.snapshots.replicate=2 sends snapshots to another node"),
    ([*NODES, "1", REPLICATE, "checkpoint.snapshots.every=3"], "replicate=2 must be a multiple of"),
    ([*RL, "rl.rewards=last-numbr"], "rl.rewards: 'last-numbr' is not a reward; there are last-nu"),
    ([*RL, "rl.rewards=none.py:f"], "rl.rewards: none.py:f: there is no file none.py"),
    ([*RL, "rl.rewards=json:dumps"], "rl.rewards: json:dumps: it is called as dumps(prompt, compl"),
    ([*RL, "rl.rewards={exact: 0}"], "rl.rewards: the weight of exact is 0.0; nothing to learn f"),
    ([*RL, "rl.environment=json:loads"], "rl.environment: json:loads: it is called as loads(clie"),
    ([*RL, "rl.environment=verifiers:gsm8k"], "rl.environment: verifiers:gsm8k: No module named "),
    (["train", "run.yaml", "log.samples=-1"], "log.samples must not be negative, got -1"),
    (["train", "run.yaml", "log.samples=[a, ' ']"], "log.samples holds an empty message"),
    (["train", "run.yaml", "log.samples=yes"], "log.samples must be an integer or a list of texts"),
    (["train", "run.yaml", "log.sample_tokens=0"], "log.sample_tokens must be at least 1, got 0"),
    (
        ["train", "run.yaml", "--nproc", "2", "parallel.pp=2", "log.samples=3"],
        "log.samples does not run with parallel.pp=2. Set parallel.pp=1;",
    ),
    (
        ["train", "run.yaml", "--nproc", "2", "parallel.cp=2", "log.samples=[Hello]"],
        "log.samples does not run with parallel.cp=2. Set parallel.cp=1;",
    ),
    (["train", "run.yaml", "train.patience=-1"], "train.patience must not be negative, got -1"),
    (["train", "run.yaml", "train.patience=2"], "train.patience=2 needs evaluations: name"),
    (
        ["train", "run.yaml", "train.patience=2", "data.eval=a.jsonl"],
        "train.patience=2 needs train.eval_every: without it",
    ),
    (
        ["train", "run.yaml", "checkpoint.keep_best=true", "train.eval_every=2"],
        "checkpoint.keep_best=true needs evaluations: name data.eval",
    ),
    (["train", "run.yaml", "checkpoint.keep_best=3"], "checkpoint.keep_best must be true or false"),
    (["chat", "gone/best"], "gone/best names step_000009, which is not there"),
    (["export", "odd/latest", "out"], "odd/latest holds '../adapter', which is not the name of"),
    (["train", "circle.yaml"], "circle.yaml: base leads round in a circle"),
    (["data", "run.yaml", "data.train=none.jsonl"], "none.jsonl: no such file (looked in"),
    (["data", "run.yaml", "data.eval=empty"], "empty: this is a folder; name one .jsonl"),
    (["data", "run.yaml", "--remove-unused", "-1"], "--remove-unused must be 0 days or more"),
    (["plan", "run.yaml", "--gpus", "1", "--out", "a.jsonl/x.yaml"], "a.jsonl/x.yaml cannot be"),
    (["options", "trian"], "there is no section or option trian; did you mean train?"),
    (["options", "train", "lora"], "megalora options: unknown argument 'lora'"),
    (["plan", "run.yaml", "--gpus", "0"], "a run needs at least 1 rank, got 0"),
    (["plan", "run.yaml", "--gpus", "8,x"], "argument --gpus: "),
    (["plan", "run.yaml", "--gpus", "8", "--gpu", "h1000"], "--gpu h1000 is neither h100, h200"),
    (["plan", "run.yaml", "--gpus", "8", "--lora-rank", "0"], "--lora-rank 0: a rank is at least"),
    (["plan", "run.yaml", "--gpus", "8", "--gpus-per-node", "0"], "a node has at least 1 GPU"),
    (["plan", "run.yaml", "--gpus", "8", "--top", "0"], "--top 0: show at least 1 layout"),
    (["init"], "run.yaml exists; choose another file with --out, or remove it"),
    (["init", *NEW, "--gpus", "0"], "--gpus 0: give a number of GPUs from 1 to 1,048,576"),
    (["init", *NEW, "--gpus", "two"], "argument --gpus: invalid int value: 'two'"),
    (["init", *NEW, "--gpus-per-node", "0"], "a node has at least 1 GPU"),
    (["init", *NEW, "--gpu", "h1000"], "--gpu h1000 is neither h100, h200"),
    (["init", "--out", "a.jsonl/x.yaml"], "a.jsonl/x.yaml cannot be written: "),
    (["init", *NEW, "--model", ""], "--model is empty; name a file or a folder"),
    (["init", *NEW, "--model", "./none"], "model.path=./none: no such folder"),
    (["init", *NEW, "--model", "a.jsonl"], "model.path=a.jsonl is a file; name the folder of"),
    (["init", *NEW, "--model", "me/none"], "model.path=me/none is neither a folder with a"),
    (["init", *NEW, "--model", "odd-base"], "model_type"),
    (["init", *NEW, "--data", "none.jsonl"], "none.jsonl: no such file (looked in"),
    (["init", *NEW, "--model", "base", "--data", "empty"], "empty: this is a folder; name one"),
    (["init", *NEW, "--model", "base", "train.lr=fast"], "train.lr must be a number, got 'fast'"),
    (["init", *NEW, "--model", "base", "--lr", "1"], "megalora init: unknown argument '--lr'"),
    (["init", *NEW, "--model", "base", "parallel.tp=2"], "the command line gives is out on 1 x"),
    (["train", "unfilled.yaml"], "unfilled.yaml: data.train is ???: fill it in"),
    (["tiny", ""], "the path is empty; name a file or a folder"),
    (["tiny", "new", "--arch", "gpt2"], "argument --arch: invalid choice: 'gpt2' (choose from"),
    (["tiny", "new", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["trian", "run.yaml"], "argument command: invalid choice: 'trian' (choose from"),
    (["tiny", "."], ". is not empty and was not written by make_tiny"),
    (["tiny", "a.jsonl"], "a.jsonl is a file; name a folder."),
    (["tiny", "tiny", "--seed", "1"], "tiny holds a tiny model made from other arguments ("),
    (["inspect", "none"], "none is not a folder; name one with adapter_config.json"),
    (["inspect", "empty"], f"empty {NOT_AN_ADAPTER}"),
    (["inspect", "ia3"], "ia3/adapter_config.json: peft_type is 'IA3'; megalora reads LORA only"),
    (["inspect", "stale"], "stale/latest names step_000009, which is not there"),
    (["inspect", "odd"], "odd/latest holds '../adapter', which is not the name of a checkpoint"),
    (["export", "empty", "out"], f"empty {NOT_AN_ADAPTER}"),
    (["export", "adapter", "adapter"], "adapter is the folder that is read; choose another folder"),
    (["export", "adapter", "ia3"], "ia3 exists and is not an empty folder; choose another"),
    (["export", "adapter", "out", "--base", "./none"], "--base=./none: no such folder"),
    (["push", "none", "me/x"], "none is not a folder; name one with adapter_config.json"),
    (["push", "empty", "me/x"], f"empty {NOT_AN_ADAPTER}"),
    (["push", "adapter", "me"], "'me' is not a repository on the hub; write OWNER/NAME"),
    (["push", "adapter", "a/b/c"], "'a/b/c' is not a repository on the hub; write OWNER/NAME"),
    (["push", "adapter", "me/a--b"], "Cannot have -- or .. in repo_id: 'me/a--b'"),
    (["push", "adapter", "me/x"], "adapter does not name its base model; give --base OWNER/NAME"),
    (["push", "adapter", "me/x", *BASE], "the base base is a folder of this machine"),
    (["push", "adapter", "me/x", "--base", "a/b"], "there is no token for the hub; run hf auth"),
    (["import", "empty", "out", *BASE], f"empty {NOT_AN_ADAPTER}"),
    (["import", "adapter", "out", "--base", "empty"], "empty is not a Hugging Face model folder:"),
    (["import", "adapter", "ia3", *BASE], "ia3 exists and is not an empty folder; choose another"),
    (["merge", "adapter", *BASE, "--out", "ia3"], "ia3 exists and is not an empty folder; choose"),
    (["merge", "adapter", "--base", "odd-base", "--out", "out"], "model_type"),
    (["verify", "none", *BASE], "none is not a folder; name one with adapter_config.json"),
    (["verify", "adapter", "--base", "a.jsonl"], "--base=a.jsonl"),
    (["chat", "./none"], "ADAPTER=./none: no such folder"),
    (["chat", ""], "ADAPTER is empty; name a file or a folder"),
    (["chat", "stale"], "stale/latest names step_000009, which is not there"),
    (["chat", "adapter"], "adapter does not name its base model; give --base"),
    (["chat", "adapter", *BASE, "--temperature", "-1"], "temperature must be 0 or above, got -1.0"),
    (["chat", "adapter", *BASE, "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
    (["chat", "adapter", *BASE, "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
    (["chat", "x", "--url", "nowhere"], "--url=nowhere is not the URL of a server"),
    (["chat", "adapter", "--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
    (["eval", "stale", *BASE], "stale/latest names step_000009, which is not there"),
    (["eval", "adapter", *BASE, "--data", "a.jsonl", "--nproc", "0"], "--nproc must be at least 1"),
    (["eval", "adapter", *BASE, "--data", "a.jsonl", "--limit", "0"], "--limit must be at least 1"),
    (["eval", "adapter", *BASE, "--data", "a.jsonl", "--rule", "regex:("], "not a regular expres"),
    (["eval", "adapter", *BASE, "--data", "a.jsonl", "--out", "a.jsonl/x"], "cannot be written: "),
    (["eval", "x", "--url", "nowhere", "--generate"], "--url=nowhere is not the URL of a server"),
    (["eval", "x", "--url", "http://127.0.0.1:1"], "--url: a server gives answers and no loss; a"),
    (
        ["eval", "x", "--url", "http://127.0.0.1:1", "--generate", "--data", "a.jsonl"],
        "http://127.0.0.1:1 does not answer (",
    ),
    (["chat", "ia3", *BASE], "ia3/adapter_config.json: peft_type is 'IA3'"),
    (["eval", "./none", "--data", "a.jsonl"], "ADAPTER=./none: no such folder"),
    (["eval", "adapter", *BASE, "--data", "a.jsonl", "--rule", "best"], "--rule best: not a rule"),
    (["report", "none"], "none is not a folder; name a run folder"),
    (["report", "empty"], "empty is not a run folder: it has no metrics.jsonl"),
    (["report", "a.jsonl"], "a.jsonl is not a folder; name a run folder, such as runs/default"),
    (["report", *"abcde"], "a page shows 4 runs at most, in colours that everybody can tell apart"),
    # Of a base of four files one is missing: before torch, with its name.
    *((arguments, "torn: 1 of 4 weight shards are missing (model-00003-of-00004") for arguments in (
        ["train", "run.yaml", "model.path=torn"],
        ["rank", "run.yaml", "model.path=torn"],
        ["chat", "torn"],
        ["chat", "adapter", "--base", "torn"],
        ["eval", "adapter", "--base", "torn", "--data", "a.jsonl"],
        ["verify", "adapter", "--base", "torn"],
        ["verify", "adapter", "--base", "torn", "--engine", "vllm"],
        ["merge", "adapter", "--base", "torn", "--out", "out"],
    )),
    # The hub is not to be reached.
    (["train", "run.yaml", "data.train=me/none:test[:9]"], "data.train=me/none is not a file here"),
    (["train", "run.yaml", "data.eval=me/none"], "data.eval=me/none is not a file here, and the"),
    (["train", "run.yaml", "model.path=me/none"], "model.path=me/none is not a folder here, and"),
    (["data", "run.yaml", "data.train=me/none"], "data.train=me/none is not a file here, and the"),
    (["eval", "adapter", *BASE, "--data", "me/none"], "--data=me/none is not a file here, and the"),
    (["serve", "=adapter"], "adapter name '': must be letters, digits, '.', '_' and '-'"),
    (["serve", "x=adapter", "x=ia3", *BASE], "two adapters are called 'x': adapter and ia3; write"),
    (["serve", "stale"], "stale/latest names step_000009, which is not there"),
    (["serve", "adapter"], "adapter does not name its base model; give --base"),
    (["serve", "adapter", *BASE, "--max-lora-rank", "8"], "vLLM's own arguments come after --"),
    (["swap", "http://127.0.0.1:1", "none"], "none is not a folder; name one with adapter_config"),
    (["swap", "http://127.0.0.1:1", "ia3"], "peft_type is 'IA3'; megalora reads LORA only"),
    (["swap", "http://127.0.0.1:1", "adapter"], "http://127.0.0.1:1 does not answer ("),
    (["serve", "empty"], f"empty {NOT_AN_ADAPTER}"),
    (["swap", "server", "adapter"], "server is not the URL of a server"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Files and folders that look right as far as each command should come."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "run.yaml").write_text(MINIMAL.replace("chats.jsonl", "a.jsonl").replace(
        "models/tiny", "base"
    ))  # fmt: skip
    unfilled = (folder / "run.yaml").read_text().replace("a.jsonl", "'???'")
    (folder / "unfilled.yaml").write_text(unfilled)
    (folder / "circle.yaml").write_text("base: circle.yaml\n")
    (folder / "a.jsonl").write_text("{}\n")
    for name in ("empty", "base", "torn", "odd-base", "adapter", "ia3", "stale", "odd", "tiny"):
        (folder / name).mkdir()
    for file in tiny.iterdir():
        (folder / "base" / file.name).symlink_to(file)
        if "00003" not in file.name:
            (folder / "torn" / file.name).symlink_to(file)
    (folder / "odd-base/config.json").write_text('{"model_type": "gpt2"}')
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    for name, config in (("adapter", plain), ("ia3", plain | {"peft_type": "IA3"})):
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    (folder / "stale/latest").write_text("step_000009\n")
    (folder / "gone").mkdir()
    (folder / "gone/best").write_text("step_000009\n")
    (folder / "odd/latest").write_text("../adapter\n")
    marker = {"arch": "qwen3_moe", "seed": 0, "dtype": "float32", "overrides": {}}
    (folder / "tiny/megalora_tiny.json").write_text(json.dumps(marker))
    return folder


def test_every_mistake_is_one_line_before_torch(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    # The code under test, wherever it lies: an installed megalora may be another one.
    root = Path(megalora.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([arguments for arguments, _ in WRONG]),
        cwd=folder,
        # A token of who runs this test would let push go on.
        env={
            **os.environ,
            "PYTHONPATH": f"{root}:{root / 'kernels'}",
            "HF_HOME": "home",
            "HF_TOKEN": "",
            # Nobody listens there: as a machine without a network.
            "HF_ENDPOINT": "http://127.0.0.1:1",
            "HF_HUB_OFFLINE": "",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    faults = []
    for (arguments, message), answer in zip(WRONG, json.loads(done.stdout), strict=True):
        code, out, err = answer
        # A path may stand before the message, and further lines of advice behind it, indented.
        first, *advice = err.splitlines() or [repr(code)]
        is_one = first.startswith("megalora") and all(line.startswith("  ") for line in advice)
        if (code, out) != (2, "") or not is_one or message not in first:
            faults.append((arguments, answer))
    assert not faults
    # None of them has made anything.
    assert sorted(folder.rglob("*")) == before
