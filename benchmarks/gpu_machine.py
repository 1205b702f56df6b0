"""Start the programs of ``gpu_all.sh`` on this machine, each in its own process. Standard library
only."""

import glob
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_outcomes import Outcome, unfinished
from benchmarks.gpu_steps import RESULTS, STEPS, Step, command_of

ROOT = Path(__file__).parents[1]
STARTED = "MEGALORA_BENCHMARK_STARTED"
"""Tells a program since when its budget runs (``gpu_timing.Budget``)."""
GRACE_S = 8
"""Between asking a step that outran its limit to end and killing it."""
PROBE = """
import importlib.metadata, importlib.util, json, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
found = {name: there(name) for name in sys.argv[1:]}
try:
    triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    number = lambda version: tuple(map(int, version.split(".")[:2]))
    found["interpreter"] = not (number(triton) < (3, 7) and number(numpy) >= (2, 4))
except importlib.metadata.PackageNotFoundError:
    pass
if found.get("torch"):
    import torch
    found["gpu"] = torch.cuda.is_available()
print(json.dumps(found))
"""
"""Which modules there are, whether torch finds a GPU, and whether Triton can interpret loops
(before
3.7 it turns arrays of one number into integers, which NumPy refuses from 2.4 on): in a process of
its own, for this one needs no torch."""


@dataclass(frozen=True)
class Machine:
    """How programs are started here."""

    python: str
    results: Path
    dry: bool
    site: Path
    """Where wheels were installed for this call."""
    modules: dict[str, bool]

    def environment_of(self, step: Step) -> dict[str, str]:
        """Return the variables of a step's program."""
        found = dict(os.environ)
        for name in ("MEGALORA_BACKEND", "MEGALORA_TUNED", "TRITON_INTERPRET"):
            found.pop(name, None)
        path = [str(ROOT / "kernels"), str(ROOT), str(self.site), os.environ.get("PYTHONPATH", "")]
        found |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
        found |= {"HF_HUB_OFFLINE": "1", "MEGALORA_TEST_GPU": "1"}
        if self.dry:
            found |= {
                "TRITON_INTERPRET": str(int(step.interpreted)),
                "MEGALORA_TEST_GPU": "0",
                "CUDA_VISIBLE_DEVICES": "",
            }
            found.setdefault("OMP_NUM_THREADS", "1")
        for name, value in step.environment.items():
            value = value.replace(RESULTS, str(self.results))
            # Without a table that was to be written before, the rule of the kernels holds.
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
        return (
            f"no module {', '.join(absent)}: benchmarks/README.md says what to bring"
            if absent
            else ""
        )

    def run(self, step: Step, limit_s: float) -> Outcome:
        """Run a step's program for at most ``limit_s`` and say what became of it."""
        begun = time.monotonic()
        cpu_begun = cpu_of_children()
        log = self.log_of(step)
        budget_s = max(1.0, limit_s - step.margin_s)
        command = [self.python, *command_of(step, self.results, budget_s, self.dry)]
        environment = self.environment_of(step) | {STARTED: str(time.time())}
        with log.open("ab") as file:
            # A session of its own, so that a limit ends its ranks too.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            code = _wait(process, limit_s)
        seconds = round(time.monotonic() - begun, 1)
        cpu_s = round(cpu_of_children() - cpu_begun, 1)
        return Outcome(*self._judge(step, code, limit_s, log), seconds=seconds, cpu_s=cpu_s)

    def _judge(self, step: Step, code: int | None, limit_s: float, log: Path) -> tuple[str, str]:
        """(result, why)."""
        if code is None:
            return "stopped", f"stopped after {limit_s:.0f} s; see {log.name}"
        if code:
            return "failed", f"exit code {code}; see {log.name}"
        path = self.results / step.result
        if not path.is_file():
            return "failed", f"exit code 0, but no {step.result}; see {log.name}"
        try:
            left = unfinished(json.loads(path.read_text()))
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            return "failed", f"{step.result} is no record: {error}"
        return ("part", f"{len(left)} cases not reached, first {left[0]}") if left else ("ok", "")


def cpu_of_children() -> float:
    """Return seconds of processor time of all processes that have ended and that this one started,
    or they did."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Return the exit code; None where the limit came first, and then end the program with all it
    started.

    Ranks of torchrun are no members of its group of processes: it must have the time to end them
    itself.
    """
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return None
    except (
        BaseException
    ):  # ended itself, as by Ctrl-C, which does not reach the program's own session
        _end(process)
        raise


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
    process.poll()  # else it would be left itself, as one that nobody has waited for
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def install_wheels(python: str, site: Path) -> str:
    """Install ``.whl/*.whl`` into ``site``; returns what went wrong."""
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
    names = ["torch", "triton", *sorted({name for step in STEPS for name in step.modules})]
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
    return json.loads(done.stdout.splitlines()[-1])


def check_machine(modules: dict[str, bool], python: str, dry: bool) -> None:
    """Raise ``ValueError`` where nothing could be measured."""
    if not modules.get("torch"):
        raise ValueError(f"{python} has no torch; PYTHON names another interpreter")
    if not modules.get("gpu") and not dry:
        raise ValueError(
            f"torch of {python} finds no CUDA device; --dry tries the same path on a CPU"
        )
    if dry and not modules.get("interpreter", True):
        print(
            "gpu_all.sh: Triton before 3.7 cannot interpret kernels beside NumPy 2.4 and later:"
            " steps with kernels will fail in this dry run (on a GPU they do not interpret any)",
            file=sys.stderr,
            flush=True,
        )
