"""Start the programs of ``gpu_all.sh`` on this machine, each in its own process.

Standard library only, as the interpreter that runs this may have nothing else.
"""

import glob
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_outcomes import Outcome, unfinished
from benchmarks.gpu_steps import RESULTS, STEPS, Step, command_of

ROOT = Path(__file__).parents[1]
STARTED = "MEGALORA_BENCHMARK_STARTED"
"""Variable that tells a program since when its budget runs (``gpu_timing.Budget``): importing torch
takes seconds of it."""
GRACE_S = 8
"""Seconds between asking a step that outran its limit to end and killing it."""
PROBE = """
import importlib.metadata, importlib.util, json, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
found = {name: there(name) for name in sys.argv[1:]}
try:
    triton = importlib.metadata.version("triton")
    numpy = importlib.metadata.version("numpy")
    number = lambda version: tuple(map(int, version.split(".")[:2]))
    found["interpreter"] = not (number(triton) < (3, 7) and number(numpy) >= (2, 4))
except importlib.metadata.PackageNotFoundError:
    pass
if found.get("torch"):
    import torch
    found["gpu"] = torch.cuda.is_available()
print(json.dumps(found))
"""
"""Program that prints which modules there are, whether torch finds a GPU, and whether Triton can
interpret loops: before 3.7 it turns arrays of one number into integers, which NumPy refuses from
2.4 on. It runs in a process of its own, because importing torch would take seconds and memory of
this one."""


@dataclass(frozen=True)
class Machine:
    """How programs are started here."""

    python: str
    results: Path
    dry: bool
    site: Path
    """Folder into which wheels were installed for this call."""
    modules: dict[str, bool]
    """Whether each module that a step may need is installed; the answer of ``probe``."""

    def environment_of(self, step: Step) -> dict[str, str]:
        """Return the variables of a step's program."""
        found = dict(os.environ)
        # Left over in the user's shell they would change what is measured.
        for name in ("MEGALORA_BACKEND", "MEGALORA_TUNED", "TRITON_INTERPRET"):
            found.pop(name, None)
        # Ours first: an installed megalora must not be measured in the place of this checkout.
        path = [str(ROOT / "kernels"), str(ROOT), str(self.site)]
        if os.environ.get("PYTHONPATH"):
            path.append(os.environ["PYTHONPATH"])
        # Unbuffered, so that the log of a program that is killed has its last words.
        found |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
        found |= {"HF_HUB_OFFLINE": "1", "MEGALORA_TEST_GPU": "1"}
        if self.dry:
            found |= {
                "TRITON_INTERPRET": str(int(step.interpreted)),
                "MEGALORA_TEST_GPU": "0",
                "CUDA_VISIBLE_DEVICES": "",
            }
            # Several ranks of a dry run share the cores.
            found.setdefault("OMP_NUM_THREADS", "1")
        for name, value in step.environment.items():
            value = value.replace(RESULTS, str(self.results))
            # Without the table of an earlier step, the kernels fall back on their rule.
            if RESULTS not in step.environment[name] or Path(value).is_file():
                found[name] = value
        return found

    def log_of(self, step: Step) -> Path:
        """Return the file for all that a step's program says, in all calls."""
        return self.results / f"{Path(step.result).stem}.txt"

    def missing(self, step: Step) -> str:
        """Return why a step cannot be run, or nothing."""
        if step.after and not (self.results / step.after).is_file():
            return f"{step.after} is not there"
        absent = [name for name in step.modules if not self.modules.get(name)]
        if absent:
            return f"no module {', '.join(absent)}: benchmarks/README.md says what to bring"
        return ""

    @contextmanager
    def started(self, step: Step, limit_s: float) -> Iterator["Program"]:
        """Start a step's program, which may take ``limit_s``, and end it with the block."""
        log = self.log_of(step)
        # The program ends by itself before its limit, with its JSON written.
        budget_s = max(1.0, limit_s - step.margin_s)
        command = [self.python, *command_of(step, self.results, budget_s, self.dry)]
        environment = self.environment_of(step) | {STARTED: str(time.time())}
        with log.open("ab") as file:
            # A session of its own, so that a limit ends its ranks too.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield Program(self, step, process, limit_s)
        finally:
            # Where this process is being ended, as by Ctrl-C, which does not reach the program's
            # own session.
            _end(process)

    def run(self, step: Step, limit_s: float) -> Outcome:
        """Run a step's program for at most ``limit_s`` and say what became of it."""
        with self.started(step, limit_s) as program:
            return program.outcome()

    def judge(self, step: Step, code: int | None, limit_s: float, log: Path) -> tuple[str, str]:
        """Result and reason of an ``Outcome``."""
        if code is None:
            return "stopped", f"stopped after {limit_s:.0f} s; see {log.name}"
        if code:
            return "failed", f"exit code {code}; see {log.name}"
        # Exit code 0 is not enough: a program may have had no time for some of its cases.
        path = self.results / step.result
        if not path.is_file():
            return "failed", f"exit code 0, but no {step.result}; see {log.name}"
        try:
            left = unfinished(json.loads(path.read_text()))
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            return "failed", f"{step.result} is no record: {error}"
        return ("part", f"{len(left)} cases not reached, first {left[0]}") if left else ("ok", "")


class Program:
    """A step's program that runs."""

    def __init__(
        self, machine: Machine, step: Step, process: subprocess.Popen[bytes], limit_s: float
    ) -> None:
        self.machine = machine
        self.step = step
        self.process = process
        self.limit_s = limit_s
        self.begun = time.monotonic()
        self.cpu_begun = cpu_of_children()

    def outcome(self) -> Outcome:
        """Wait for its end, at most until its limit, and say what became of it."""
        left_s = max(0.0, self.limit_s - (time.monotonic() - self.begun))
        code = _wait(self.process, left_s)
        seconds = round(time.monotonic() - self.begun, 1)
        cpu_s = round(cpu_of_children() - self.cpu_begun, 1)
        log = self.machine.log_of(self.step)
        verdict = self.machine.judge(self.step, code, self.limit_s, log)
        return Outcome(*verdict, seconds=seconds, cpu_s=cpu_s)


def cpu_of_children() -> float:
    """Return seconds of processor time of all processes that have ended and that this one started,
    or they did."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Return the exit code; None where the limit came first, and then end the program with all it
    started.

    torchrun starts its ranks in groups of processes of their own: a signal to the program's group
    does not reach them, so torchrun must have the time to end them itself.
    """
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask all of a program to end, and kill after a while what has not."""
    if not _lives(process):
        return
    os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and _lives(process):
        time.sleep(0.1)
    if _lives(process):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the program's group of processes is left."""
    # A process that has ended stays in its group until somebody asks for its exit code.
    process.poll()
    try:
        # Signal 0 is not sent; the call only fails where there is nobody to send it to.
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def install_wheels(python: str, site: Path) -> str:
    """Install ``.whl/*.whl`` into ``site``; returns what went wrong.

    A machine with a GPU may have no network: wheels travel with the checkout, and pip looks nowhere
    else.
    """
    wheels = sorted(glob.glob(str(ROOT / ".whl/*.whl")))
    if not wheels:
        return ""
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    command = [python, "-m", "pip", "install", "-q", *options, "--target", str(site), *wheels]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip()[-500:] if done.returncode else ""


def probe(python: str, site: Path) -> dict[str, bool]:
    """Return which modules there are, and whether there is a GPU. Raises ``ValueError`` where that
    cannot be found out."""
    wanted: set[str] = set()
    for step in STEPS:
        wanted.update(step.modules)
    names = ["torch", "triton", *sorted(wanted)]
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [python, "-c", PROBE, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{python} cannot be asked for its modules: {last}")
    # The last line: importing a module may print.
    return json.loads(done.stdout.splitlines()[-1])


def check_machine(modules: dict[str, bool], python: str, dry: bool) -> None:
    """Raise ``ValueError`` where nothing could be measured."""
    if not modules.get("torch"):
        raise ValueError(f"{python} has no torch; set PYTHON to an interpreter that has it")
    if not modules.get("gpu") and not dry:
        raise ValueError(
            f"torch of {python} finds no CUDA device; --dry tries the same path on a CPU"
        )
    if dry and not modules.get("interpreter", True):
        print(
            "gpu_all.sh: Triton before 3.7 cannot interpret kernels with NumPy 2.4 and later:"
            " steps with kernels will fail in this dry run (on a GPU nothing is interpreted)",
            file=sys.stderr,
            flush=True,
        )
