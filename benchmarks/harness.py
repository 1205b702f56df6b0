"""Shared by every benchmark: a number without its machine and version is not a result."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalora import host

host.install()  # before anything from megatron

PACKAGES = ("torch", "megatron-core", "megatron-bridge", "transformers", "peft")


def save(name: str, rows: list[dict[str, Any]], out: Path) -> None:
    """Write rows as JSON with device, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "benchmark": name,
        "device": f"{host.device_name()} ({platform.machine()})",
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit or None,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
