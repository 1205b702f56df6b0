"""The published configs of runs that sample, and the script that starts them."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_script_says_how_it_is_called() -> None:
    script = ROOT / "launch/rl.sh"
    for arguments in ([], ["serve", "base"], ["train"], ["other"]):
        run = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == 2 and run.stderr.startswith("usage: launch/rl.sh serve BASE")
    run = subprocess.run([script, "train", "no.yaml"], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "no.yaml" in run.stderr
