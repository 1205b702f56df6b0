"""Write the record of a benchmark that needs Megatron: rows with device, versions and commit, since
a number without its machine and version is not a result."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalora import host
from megalora.versions import commit

# Before anything from megatron is imported: on a CPU it answers Megatron's calls of torch.cuda.
host.install()

PACKAGES = ("torch", "megatron-core", "megatron-bridge", "transformers", "peft")


def save(name: str, rows: list[dict[str, Any]], out: Path, **more: Any) -> None:
    """Write rows as JSON with device, versions and commit.

    Args:
        more: other keys of the record.
    """
    record = {
        "benchmark": name,
        "device": f"{host.device_name()} ({platform.machine()})",
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "rows": rows,
        **more,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # A call that is cut off leaves the record of before.
    whole = out.with_name(f".{out.name}.tmp")
    whole.write_text(json.dumps(record, indent=1) + "\n")
    whole.replace(out)
    print(f"wrote {out}")
