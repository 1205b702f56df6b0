"""Mistakes of whoever calibrates: each is one message, before anything is measured."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megalora.bench import calibrate as calibration
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["x.json", "--dtype", "int8"],
            "--dtype: 'int8' cannot be calibrated; want bfloat16 or float32",
        ),
        (
            ["x.json", "--budget-seconds", "0"],
            "--budget-seconds: 0.0 leaves no time to measure; want more than 0",
        ),
        # nan is not <= 0 either, so a check for that would let it through.
        (["x.json", "--budget-seconds", "nan"], "--budget-seconds: nan leaves no time"),
        (["x.json", "--budget-seconds", "long"], "invalid float value: 'long'"),
        (["."], ". is a folder; name the file to write"),
        ([__file__ + "/x.json"], "test_calibrate_mistakes.py is a file"),
        ([], "the following arguments are required: out"),
    ],
)
def test_mistakes_show_before_anything_is_measured(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        calibration.main(arguments)


def _with_other_numbers_of_ranks(out: Path) -> str:
    # As on two nodes, of which one has a rank and the other two.
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + dist.get_rank())
    with pytest.raises(
        ValueError, match="nodes have from 1 to 2 ranks; calibration needs the same number on each"
    ):
        calibration.calibrate(out, dtype="float32")
    return "said"


def test_nodes_with_other_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    assert run_ranks(_with_other_numbers_of_ranks, 2, tmp_path / "x.json") == ["said", "said"]


@pytest.mark.slow
def test_the_command_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    command = [sys.executable, "-m", "megalora.bench.calibrate", str(out), "--dtype", "int8"]
    shown = subprocess.run(command, capture_output=True, text=True)
    expected = "megalora: --dtype: 'int8' cannot be calibrated; want bfloat16 or float32\n"
    assert (shown.returncode, shown.stdout, shown.stderr) == (2, "", expected)
    assert not list(tmp_path.iterdir())
