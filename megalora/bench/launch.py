"""Start the ranks of one layout as processes of their own, and leave none behind when they end or
take too long."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalora.config.checks import require

TOKEN = "MEGALORA_BENCH_RUN"
"""Environment variable that marks every process of one run. torchrun gives each rank a session, and
so a process group, of its own: a signal to torchrun's group would not reach them."""
PATIENCE_S = 15
"""Seconds that torchrun has to end its ranks before what is left is killed."""
SCRIPT = Path(__file__).with_name("torchrun_node.sh")
"""Part of the package, so that an installed one has it; ``launch/torchrun_node.sh`` is a link to
it."""
MODULE = "megalora.bench.measure"


@dataclass(frozen=True)
class Nodes:
    """The machines this benchmark runs on; each runs its own driver, with the same arguments."""

    count: int
    rank: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Nodes":
        """Read NNODES and NODE_RANK, or what launch/torchrun_node.sh takes in their place; one
        machine where none is set."""

        def first(*names: str) -> str | None:
            for name in names:
                # An empty variable counts as one that is not set, as in the script.
                if environment.get(name):
                    return environment[name]
            return None

        # PET_*: torchrun's own; SLURM_*: set by srun.
        count = first("NNODES", "PET_NNODES", "SLURM_STEP_NUM_NODES") or "1"
        rank = first("NODE_RANK", "PET_NODE_RANK", "SLURM_NODEID") or ""
        require(
            count.isdigit() and int(count) >= 1, f"NNODES={count} is not a number of at least 1"
        )
        if int(count) == 1:
            return cls(1, 0)
        require(
            rank.isdigit() and int(rank) < int(count),
            f"NODE_RANK={rank}: with NNODES={count}, give every node its own number from 0 to"
            f" {int(count) - 1}",
        )
        return cls(int(count), int(rank))

    @property
    def writes(self) -> bool:
        return self.rank == 0


def command(
    nodes: Nodes, num_ranks: int, arguments: Sequence[str], name: str, module: str | None = None
) -> tuple[list[str], dict[str, str]]:  # fmt: skip
    """What to run on this node, and its environment.

    Args:
        num_ranks: over all nodes.
        arguments: of the module, by default ``megalora.bench.measure``, the config first.
        name: name of this run, the same on all nodes and another for every run, so that stragglers
            of the last one do not join.
    """
    module = module or MODULE
    environment = {
        **os.environ,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE_S // 3),
        TOKEN: uuid.uuid4().hex,
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    if nodes.count == 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        ranks = ["--standalone", "--nproc-per-node", str(num_ranks)]
        return [*torchrun, *ranks, "-m", module, *arguments], environment
    require(
        num_ranks % nodes.count == 0,
        f"{num_ranks} ranks cannot be shared out evenly over NNODES={nodes.count} nodes",
    )
    environment["MODULE"] = module
    environment["RDZV_ID"] = f"{environment.get('RDZV_ID', 'megalora')}-{name}"
    environment["NPROC_PER_NODE"] = str(num_ranks // nodes.count)
    # The script takes python and torchrun from PATH: let it find those of this environment.
    own_programs = str(Path(sys.executable).parent)
    path = environment.get("PATH")
    # An empty entry of PATH would mean the current folder.
    environment["PATH"] = f"{own_programs}{os.pathsep}{path}" if path else own_programs
    return ["bash", str(SCRIPT), *arguments], environment


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise ``SystemExit`` while the block runs, so that what it started ends
    with it."""

    def end(number: int, _: object) -> None:
        # A shell's exit status for a process that a signal ended.
        sys.exit(128 + number)

    before_term = signal.signal(signal.SIGTERM, end)
    before_hangup = signal.signal(signal.SIGHUP, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before_term)
        signal.signal(signal.SIGHUP, before_hangup)


def run_to_log(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path, timeout_s: float
) -> int | None:
    """Run a command to its end, with all output in ``log``.

    When this returns or raises, Ctrl-C included, none of its processes is left.

    Returns:
        The exit code, or None if it took longer than ``timeout_s``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process, environment[TOKEN])


def _end(process: subprocess.Popen[bytes], token: str) -> None:
    """End a command and all processes that it started, whatever groups they are in."""
    if process.poll() is None:
        # torchrun ends its ranks when it gets SIGTERM, and has to survive them to do so.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    deadline = time.monotonic() + PATIENCE_S
    left = processes_of(token)
    while left:
        for pid in left:
            # It may have ended by itself by now.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"processes {left} of a benchmark do not end, though they were killed; end them by"
                " hand"
            )
        # A killed process takes a moment to give back a GPU's memory.
        time.sleep(0.2)
        left = processes_of(token)


def processes_of(token: str) -> list[int]:
    """Ids of the living processes of a run."""
    wanted = f"{TOKEN}={token}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # Variables are separated by zero bytes. A zombie has none left.
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            # It has just ended, or belongs to another user.
            continue
        if wanted in variables:
            found.append(int(folder.name))
    return found
