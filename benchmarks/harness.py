"""Shared by every benchmark: a number without its machine and version is not a result."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalora import host
from megalora.bench.versions import commit

host.install()  # before anything from megatron

PACKAGES = ("torch", "megatron-core", "megatron-bridge", "transformers", "peft")


def save(name: str, rows: list[dict[str, Any]], out: Path) -> None:
    """Write rows as JSON with device, versions and commit."""
    record = {
        "benchmark": name,
        "device": f"{host.device_name()} ({platform.machine()})",
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
