"""Run a recipe in a copy, because it writes below its own folder."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_recipe(name: str, folder: Path, shorter: Mapping[str, str]) -> str:
    """What ``recipes/NAME/run.sh`` prints in ``folder``; fails where it does.

    Args:
        shorter: texts of its files to replace, so that it takes fewer steps.
    """
    (folder / "recipes" / name).mkdir(parents=True)
    for file in sorted((ROOT / "recipes" / name).glob("*.*")):
        text = file.read_text()
        for old, new in shorter.items():
            text = text.replace(old, new)
        (folder / "recipes" / name / file.name).write_text(text)
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", f"recipes/{name}/run.sh"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
