"""What a number was measured with."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path


def versions() -> dict[str, str]:
    """Of what computes, and the commit of this repository (with a plus where files differ from it); empty outside one."""
    found = {name: metadata.version(name) for name in ("torch", "triton", "megatron-core", "megatron-bridge")}
    git = ["git", "-C", str(Path(__file__).parent)]
    commit, changed = (
        subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
    )
    return {"python": platform.python_version(), **found, "commit": commit + "+" * bool(changed)}
