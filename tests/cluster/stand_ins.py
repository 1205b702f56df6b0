"""Run the launch scripts with stand-ins for what they start, which print how they were started."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
FAKES = {
    # Everything but torchrun is Python's to do.
    "python": (
        f"""
        [[ "$1 $2" = "-m megalora.launching" ]] || exec {sys.executable} "$@"
        shift 2
        exec torchrun "$@\""""
    ),
    # Its process id, what the scripts set for it, then its arguments, one a line.
    "torchrun": (
        'echo "pid=$$ OMP=$OMP_NUM_THREADS timeout=$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"; printf "%s\\n"'
        ' "$@"'
    ),
    # Ends at once, or runs until SIGTERM if there is a file "hang".
    "srun": (
        """
        echo "srun $* NNODES=$NNODES MASTER=$MASTER_ADDR:$MASTER_PORT RDZV_ID=$RDZV_ID" >>log
        [[ -e hang ]] || exit 0
        trap 'sleep 0.3; echo saved >>log; exit 1' TERM
        echo $$ >srun.pid
        while :; do sleep 0.02; done"""
    ),
    "scontrol": (
        'if [[ $1 = show ]]; then printf "node-a\\nnode-b\\n"; else echo "scontrol $*" >>log; fi'
    ),
    "scancel": 'echo "scancel $*" >>log; kill -TERM "$(cat srun.pid)"',
    "squeue": "cat state",
    "megalora": 'printf "%s\\n" "$@"',
}


@pytest.fixture
def copy(tmp_path: Path, tiny: Path) -> Path:
    """launch/ in a folder without .venv, so that the stand-ins on PATH are what it starts; with
    what the quickstart reads."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart/base").symlink_to(tiny)
    (tmp_path / "runs/quickstart/arithmetic.jsonl").write_text("")
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """No GPU, and no job this test may itself be running in."""
    of_a_job = re.compile(r"SLURM|PET_|NNODES|NODE_RANK|MASTER|NPROC|RDZV|LOCAL_|OMP|RANK|WORLD")
    clean = {}
    for name, value in os.environ.items():
        if not of_a_job.match(name):
            clean[name] = value
    # The stand-ins come before what they stand for.
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**clean, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **extra}


def launch(
    folder: Path, script: str, *arguments: str, **extra: str
) -> subprocess.CompletedProcess[str]:
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(folder, **extra),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.fixture
def listening() -> Iterator[int]:
    """A port at which somebody answers, as node 0's torchrun would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
