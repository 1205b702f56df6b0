"""Fill the table of docs/runs.md that says how runs came through injected faults."""

import json
from pathlib import Path

from benchmarks.chaos.table import table_of
from docs.scripts.sections import fill

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/runs.md"
RECORD = ROOT / "benchmarks/results/chaos.json"


def page() -> str:
    """docs/runs.md with the faults of the last ``make chaos``."""
    return fill(PAGE.read_text(), {"chaos": table})


def table() -> str:
    """One row per kind of fault, and what was measured with what."""
    record = json.loads(RECORD.read_text())
    versions = record["versions"]
    commands = " and ".join(f"`{command}`" for command in record["commands"])
    measured = (
        f"Measured by {commands} on commit {record['commit'][:9]}, torch {versions['torch']},"
        f" {record['device']}. Seconds are from the fault to the result."
    )
    return f"{table_of(record['rows'])}\n\n{measured}"
