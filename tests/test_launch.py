"""The launch scripts up to the process they start, which is a stand-in here, and the configs they are called with."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalora.config_file import load_config

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")

FAKES = {
    "torchrun": 'echo "pid=$$ OMP=$OMP_NUM_THREADS timeout=$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"; printf "%s\\n" "$@"',
    # Ends at once, or runs until SIGTERM if there is a file "hang".
    "srun": """
        echo "srun $* NNODES=$NNODES MASTER=$MASTER_ADDR:$MASTER_PORT RDZV_ID=$RDZV_ID" >>log
        [[ -e hang ]] || exit 0
        trap 'sleep 0.3; echo saved >>log; exit 1' TERM
        echo $$ >srun.pid
        while :; do sleep 0.02; done""",
    "scontrol": 'if [[ $1 = show ]]; then printf "node-a\\nnode-b\\n"; else echo "scontrol $*" >>log; fi',
    "scancel": 'echo "scancel $*" >>log; kill -TERM "$(cat srun.pid)"',
    "squeue": "cat state",
    "megalora": 'printf "%s\\n" "$@"',
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """launch/ in a folder without .venv, so that the stand-ins on PATH are what it starts."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """No GPU, and no job this test may itself be running in."""
    clean = {
        k: v for k, v in os.environ.items() if not re.match(r"SLURM|NNODES|NODE_RANK|MASTER|NPROC|RDZV|LOCAL_|OMP", k)
    }
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**clean, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **extra}


def launch(folder: Path, script: str, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(folder, **extra), capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_bash_can_parse_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", ["local.sh", "torchrun_node.sh"])
def test_usage(script: str) -> None:
    assert os.access(ROOT / "launch" / script, os.X_OK)
    for flag in ("-h", "--help"):
        shown = launch(ROOT, script, flag)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.startswith(f"usage: launch/{script} CONFIG.yaml")
    without = launch(ROOT, script)
    assert (without.returncode, without.stderr, without.stdout) == (2, shown.stdout, "")


def test_serve_passes_adapters_base_and_the_rest(copy: Path) -> None:
    shown = launch(ROOT, "serve.sh", "--help")
    assert (shown.returncode, shown.stderr) == (0, "") and shown.stdout.startswith(
        "usage: launch/serve.sh BASE ADAPTER"
    )
    assert launch(ROOT, "serve.sh", "base").returncode == 2
    served = launch(
        copy,
        "serve.sh",
        "base",
        "a=my adapter",
        "runs/b",
        "--",
        "--port",
        "1",
        "--",
        "-tp",
        "2",
        MEGALORA_VLLM_PYTHON="python",
    )
    assert served.stdout.splitlines() == [
        "serve", "a=my adapter", "runs/b", "--base", "base", "--port", "1", "--", "-tp", "2",
    ]  # fmt: skip


TWO_NODES = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "1"}


@pytest.mark.parametrize(
    ("script", "arguments", "extra", "message"),
    [
        ("local.sh", ["nope.yaml"], {}, "nope.yaml: no such config file"),
        ("local.sh", [QUICKSTART, "0"], {}, "NPROC_PER_NODE=0 is not a number of at least 1"),
        ("local.sh", [QUICKSTART, "3"], {}, "3 ranks cannot hold the expert grid: etp=1 * ep=2 * pp=1 = 2"),
        ("local.sh", [QUICKSTART, "4"], {"CUDA_VISIBLE_DEVICES": "0,2"}, "4 ranks on this node, but it has 2 GPUs"),
        ("torchrun_node.sh", [QUICKSTART], {**TWO_NODES, "NNODES": "two"}, "NNODES=two is not a number"),
        ("torchrun_node.sh", [QUICKSTART], {**TWO_NODES, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (
            "torchrun_node.sh",
            [QUICKSTART],
            {**TWO_NODES, "NODE_RANK": ""},
            "give every node its own number from 0 to 1",
        ),
        ("torchrun_node.sh", [QUICKSTART], {**TWO_NODES, "NODE_RANK": "2"}, "NODE_RANK=2: with NNODES=2"),
        ("torchrun_node.sh", [QUICKSTART], {**TWO_NODES, "MASTER_ADDR": "no host"}, "MASTER_ADDR=no host: "),
        ("slurm.sbatch", [], {}, "usage: sbatch"),
        ("slurm.sbatch", [QUICKSTART], {}, "not inside a Slurm job"),
    ],
)
def test_mistakes_are_one_line(
    copy: Path, script: str, arguments: list[str], extra: dict[str, str], message: str
) -> None:
    result = launch(copy, script, *arguments, **extra)
    assert result.returncode != 0
    assert message in result.stderr
    assert result.stdout == "", "nothing may have been started"
    assert "Traceback" not in result.stderr


def test_local_starts_one_rank_per_gpu_and_hands_overrides_on(copy: Path) -> None:
    overrides = ["train.micro_batch_size=2", "lora.layers=0-1,3"]
    result = launch(copy, "local.sh", QUICKSTART, *overrides, CUDA_VISIBLE_DEVICES="4,5,6,7")
    first, *arguments = result.stdout.splitlines()
    assert first.endswith("OMP=1 timeout=600")
    assert arguments[:5] == ["--nnodes", "1", "--nproc-per-node", "4", "--standalone"]
    assert arguments[5:] == ["-m", "megalora.train", QUICKSTART, *overrides]


@pytest.mark.parametrize(("rank", "is_host", "address"), [("0", 1, "localhost"), ("1", 0, "127.0.0.1")])
def test_nodes_meet_at_node_zero(copy: Path, rank: str, is_host: int, address: str) -> None:
    settings = {
        "NNODES": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29501",
        "NPROC_PER_NODE": "3",
        "RDZV_ID": "me",
    }
    arguments = ["parallel.ep=6", "train.global_batch_size=48", "checkpoint.dir=with a space"]
    result = launch(copy, "torchrun_node.sh", QUICKSTART, *arguments, **settings, SLURM_NODEID=rank)
    said = result.stdout.splitlines()[1:]
    assert said[:6] == ["--nnodes", "2", "--nproc-per-node", "3", "--rdzv-backend", "c10d"]
    assert said[6:10] == ["--rdzv-endpoint", "localhost:29501", "--rdzv-id", "me"]
    assert said[10:14] == ["--rdzv-conf", f"is_host={is_host},timeout=900,read_timeout=900", "--local-addr", address]
    assert said[14:] == ["-m", "megalora.train", QUICKSTART, *arguments]


def test_signals_reach_torchrun(copy: Path) -> None:
    """torchrun has the process id that was started: every script in between was replaced."""
    command = ["bash", "launch/local.sh", QUICKSTART, "2"]
    with subprocess.Popen(command, cwd=copy, env=environment(copy), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert f"pid={process.pid} " in process.stdout.read()


SLURM = {"SLURM_JOB_ID": "2042", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_PER_TASK": "9"}


@pytest.mark.parametrize(("restarts", "resume"), [("0", ""), ("3", " checkpoint.resume=true")])
def test_a_requeued_job_resumes(copy: Path, restarts: str, resume: str) -> None:
    extra = {**SLURM, "SLURM_SUBMIT_DIR": str(copy), "SLURM_RESTART_COUNT": restarts}
    result = launch(copy, "slurm.sbatch", "my.yaml", "train.lr=1e-3", **extra)
    assert result.returncode == 0, result.stderr
    assert (copy / "log").read_text() == (
        f"srun --kill-on-bad-exit=1 --cpus-per-task=9 launch/torchrun_node.sh my.yaml train.lr=1e-3{resume} "
        f"NNODES=2 MASTER=node-a:29542 RDZV_ID=megalora-2042-{restarts}\n"
    )


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_sigterm_lets_the_ranks_save_then_requeues(copy: Path, state: str, requeued: bool) -> None:
    (copy / "hang").touch()
    (copy / "state").write_text(state + "\n")
    command = ["bash", "launch/slurm.sbatch", "my.yaml"]
    with subprocess.Popen(command, cwd=copy, env=environment(copy, **SLURM, SLURM_SUBMIT_DIR=str(copy))) as process:
        deadline = time.monotonic() + 20
        while not (copy / "srun.pid").exists() or not (copy / "srun.pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 1
    assert (copy / "log").read_text().splitlines()[1:] == [
        "scancel --signal TERM 2042",
        "saved",
        *(["scontrol requeue 2042"] if requeued else []),
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_load_and_fit_their_world(path: Path) -> None:
    config = load_config(path)
    named, p = re.search(r"_(\d+)gpu", path.stem), config.parallel
    config.check_world(int(named[1]) if named else math.lcm(p.tp * p.pp, p.etp * p.ep * p.pp))
