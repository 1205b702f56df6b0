"""Call ``gpu_all.sh`` itself: what it refuses, how it ends, and where it writes."""

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S, is_running, said_by, wait_until

ROOT = Path(__file__).parents[1]
# An interpreter that runs the script's own two programs, answers what the machine has, lets the
# benchmark of kernels fail, and lets all others write a result at once.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *benchmarks.gpu_all*|*benchmarks.gpu_summary*) exec {python} "$@" ;;
  *"-m pip"*) exit 0 ;;
  *import*torch*) echo '{"torch": {torch}, "gpu": {gpu}, "megatron.core": true, "pytest": true}' ;;
  *bench_grouped_lora*) echo "budget: $*" && exit 1 ;;
  *) while [ "$1" != --out ]; do shift; done; echo '{"made": "up"}' >"$2" ;;
esac
"""


def interpreter(folder: Path, torch: str = "true", gpu: str = "true") -> Path:
    """Write ``PYTHON`` as a program that finds torch and a GPU or does not."""
    python = folder / "python"
    text = PYTHON.replace("{python}", sys.executable)
    python.write_text(text.replace("{torch}", torch).replace("{gpu}", gpu))
    python.chmod(0o755)
    return python


def call(
    tmp_path: Path, *words: str, torch: str = "true", gpu: str = "true"
) -> subprocess.CompletedProcess:
    """The script itself, with an interpreter whose programs are made up."""
    python = interpreter(tmp_path, torch, gpu)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    script = ["bash", str(ROOT / "benchmarks/gpu_all.sh"), *words]
    return subprocess.run(script, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_names_what_failed_and_can_be_called_again(tmp_path):
    archive = tmp_path / "all.tar.gz"
    done = call(tmp_path, "tests", "kernels", "anchors", "--archive", str(archive))
    assert done.returncode == 1, done.stderr
    assert "FAILED kernels: exit code 1; see gpu_kernels.txt" in done.stdout
    assert "--quick --budget-seconds" in (tmp_path / "out/gpu_kernels.txt").read_text()
    with tarfile.open(archive) as tar:
        packed = set(tar.getnames())
    assert packed >= {"gpu_tests.json", "gpu_all.json", "gpu_kernels.txt", "gpu_summary.txt"}
    # What is done is left alone but for the step that --again names.
    again = call(tmp_path, "tests", "kernels", "--again", "anchors")
    assert "done before: tests\n" in again.stdout and "== anchors" in again.stdout
    assert again.returncode == 1


# 128 and the number of the signal, as a shell says it. SIGINT is Ctrl-C.
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_script_that_is_ended_ends_its_step(sign, code, tmp_path):
    """The step has a session of its own, so that no signal of a terminal reaches it."""
    python = interpreter(tmp_path)
    out = tmp_path / "out"
    # One more program: a step that names its process and hangs.
    hangs = f"  *benchmarks.gpu_tests*) sleep 2; echo $$ >{tmp_path}/pid; exec sleep 600 ;;\n"
    before = "  *bench_grouped_lora*"
    python.write_text(python.read_text().replace(before, hangs + before))
    script = ["bash", str(ROOT / "benchmarks/gpu_all.sh"), "--out", str(out), "tests"]
    process = subprocess.Popen(
        script, env={**os.environ, "PYTHON": str(python)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
        # A shell lets what it starts in the background ignore SIGINT, these tests among it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    pid = tmp_path / "pid"
    # The step says so after two seconds: a signal while it is being started would leave it running.
    wait_until(lambda: said_by(pid)() or process.poll() is not None)
    assert process.poll() is None, "it ended before its step began"
    process.send_signal(sign)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    # Only after Ctrl-C is somebody there to read it.
    goes_on = "gpu_all.sh: interrupted; the same call again goes on from here\n"
    assert said == (goes_on if code == 130 else "")
    assert not is_running(int(pid.read_text())), "the step still runs"


@pytest.mark.parametrize(
    ("words", "how", "said"),
    [
        (
            ["kernel"],
            {},
            "gpu_all.sh: no step is called 'kernel'; there are tests, shared, packed,",
        ),
        (["--again", "tuna"], {}, "gpu_all.sh: no step is called 'tuna'; there are"),
        # A machine without a GPU, and one without torch.
        ([], {"gpu": "false"}, "finds no CUDA device; --dry tries the same path on a CPU"),
        ([], {"torch": "false"}, "has no torch; set PYTHON to an interpreter that has it"),
        (
            ["--seconds", "9"],
            {},
            "gpu_all.sh: --seconds 9 is too little for any step; give 23 or more",
        ),
        (
            # Where nobody can write, not even root.
            ["--archive", "/proc/no/all.tar.gz"],
            {},
            "gpu_all.sh: --archive /proc/no/all.tar.gz cannot be written: ",
        ),
        (["--archive", "/tmp"], {}, "gpu_all.sh: --archive /tmp is a folder; name a file in it"),
        (["--out", "/proc/no"], {}, "gpu_all.sh: --out /proc/no cannot be written: No such file"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, how, said):
    done = call(tmp_path, *words, **how)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout


def test_files_are_named_from_where_the_script_is_called(tmp_path, monkeypatch):
    """And nothing that lies there is imported."""
    here = tmp_path / "a folder"
    (here / "benchmarks").mkdir(parents=True)
    (here / "benchmarks/__init__.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(here)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = call(tmp_path, "tests", "--out", "out", "--archive", "packed/all.tar.gz")
    assert "   tests: ok" in done.stdout, done.stderr
    assert (here / "out/gpu_all.json").is_file() and (here / "packed/all.tar.gz").is_file()


def test_without_an_interpreter(tmp_path):
    environment = {**os.environ, "PYTHON": "no-python"}
    script = ["bash", str(ROOT / "benchmarks/gpu_all.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no 'no-python' here" in done.stderr
