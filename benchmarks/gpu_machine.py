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
from collections.abc import Generator, Sequence
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
POLL_S = 0.1
"""Seconds between two looks at each of several programs."""
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

    def run(self, steps: Sequence[Step], limit_s: float) -> Generator[tuple[Step, Outcome]]:
        """Run the programs of these steps beside each other for at most ``limit_s``; yields what
        became of each as soon as it ends.

        What still runs at the limit is ended, all at once; so is what runs when the caller leaves,
        as by Ctrl-C, which does not reach the programs' own sessions.
        """
        begun = time.monotonic()
        cpu_begun = cpu_of_children()
        running: dict[str, subprocess.Popen[bytes]] = {}

        def outcome(step: Step, code: int | None) -> Outcome:
            verdict = self._judge(step, code, limit_s)
            seconds = round(time.monotonic() - begun, 1)
            return Outcome(*verdict, seconds, round(cpu_of_children() - cpu_begun, 1))

        try:
            for step in steps:
                running[step.name] = self._start(step, limit_s)
            left_s = limit_s
            while running and left_s > 0:
                left_s = max(0.0, limit_s - (time.monotonic() - begun))
                # The end of one alone is waited for; of several, nobody knows which will be first.
                pause_s = left_s if len(running) == 1 else min(POLL_S, left_s)
                for step in [step for step in steps if step.name in running]:
                    try:
                        code = running[step.name].wait(pause_s)
                    except subprocess.TimeoutExpired:
                        continue
                    del running[step.name]
                    yield step, outcome(step, code)
                left_s -= pause_s
        finally:
            _end(list(running.values()))
        for step in steps:
            if step.name in running:
                yield step, outcome(step, None)

    def _start(self, step: Step, limit_s: float) -> subprocess.Popen[bytes]:
        """Start a step's program, which may take ``limit_s``."""
        # The program ends by itself before its limit, with its JSON written.
        budget_s = max(1.0, limit_s - step.margin_s)
        command = [self.python, *command_of(step, self.results, budget_s, self.dry)]
        environment = self.environment_of(step) | {STARTED: str(time.time())}
        with self.log_of(step).open("ab") as file:
            # A session of its own, so that a limit ends its ranks too.
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def _judge(self, step: Step, code: int | None, limit_s: float) -> tuple[str, str]:
        """Result and reason of an ``Outcome``; code None: it did not end before the limit."""
        log = self.log_of(step)
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


def cpu_of_children() -> float:
    """Return seconds of processor time of all processes that have ended and that this one started,
    or they did."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _end(programs: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask all of these programs and what they started to end, and kill after a while what has not.

    torchrun starts its ranks in groups of processes of their own: a signal to the program's group
    does not reach them, so torchrun must have the time to end them itself.
    """
    living = [process for process in programs if _lives(process)]
    for process in living:
        os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and any(_lives(process) for process in living):
        time.sleep(0.1)
    for process in living:
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
