"""The example from the package index to the report, with one small step; and what it says of a
folder in use."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.smollm2 import fetch

ROOT = Path(__file__).parents[3]
SCRIPT = "recipes/smollm2/run.sh"
DATA = Path(os.environ.get("GSM8K", ROOT.parent / "shared/data/gsm8k"))
UV = shutil.which("uv") or str(ROOT / ".tools/bin/uv")


def example(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # The package under test, and the commands of this environment.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ, "DIR": str(folder), "UV": UV, "PATH": path,
        "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return subprocess.run(
        ["bash", SCRIPT, *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_folder_in_use_is_one_line(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = example(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"megalora: the example runs in {tmp_path} already; let it end, or choose another folder"
        " with DIR=FOLDER\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# It fetches the model and trains twice: a minute and a half of two cores.
@pytest.mark.long
@pytest.mark.skipif(
    not (DATA / "train.jsonl").is_file(),
    reason=f"no GSM8K at {DATA}; set GSM8K to a folder with train.jsonl and test.jsonl",
)
def test_the_example_from_the_index_to_the_report(tmp_path: Path) -> None:
    try:
        fetch.fetch(tmp_path / "packages", UV)
    except ValueError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    options = (
        f"data.train={DATA}/train.jsonl[:8]", f"data.eval={DATA}/test.jsonl[:2]",
        "train.steps=1", "train.warmup=0", "train.global_batch_size=4", "log.sample_tokens=4",
    )  # fmt: skip
    done = example(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "The capital of France is Paris" in said
    losses = [float(line.split()[2]) for line in said.splitlines() if line.startswith("eval loss")]
    # GSM8K's test set is 1.4 on average before training; a wrong model has some log(49152) = 10.8.
    assert losses[1] < losses[0] < 3
    assert "verified: stock PEFT computes the same model" in said
    # Two questions, answered before and after.
    for number, step in ((1, 0), (2, 0), (1, 1), (2, 1)):
        assert f"answer {number} at step {step}: " in said
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    assert f"the adapter is {tmp_path}/run/step_000001" in said

    # What is there is taken as it is.
    again = example(tmp_path, *options)
    assert again.returncode == 0, again.stderr
    assert f"{tmp_path}/base is there already" in again.stdout
    assert f"continuing from {tmp_path}/run/step_000001" in again.stdout
    # 2 GB that nobody looks at afterwards.
    shutil.rmtree(tmp_path / "base")
