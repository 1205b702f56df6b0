"""Keep what became of each step of ``gpu_all.sh``, for its next call. Standard library only."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.gpu_steps import Step

STATE = "gpu_all.json"
FRESH = timedelta(hours=3)
"""Age up to which a record is continued. An older one, such as the one that is committed with the
results, may have been measured by other code."""


@dataclass
class Outcome:
    """What became of a step, in all calls so far."""

    result: str = "not reached"
    """``ok``, ``part`` (there was no time for some cases), ``failed``, ``stopped`` (at its limit),
    ``not run`` or ``not reached``."""
    why: str = ""
    seconds: float = 0.0
    """Duration in the last call that ran it."""
    cpu_s: float = 0.0
    """Processor time in that call; of steps that ran at once, that of those which ended before it
    counts, too."""
    calls: int = 0
    """Number of calls that ran it."""

    @property
    def failed(self) -> bool:
        return self.result in ("failed", "stopped")


def unfinished(record: dict[str, Any]) -> list[str]:
    """Return the names of the cases for which a program had no time, by its JSON."""
    left = list(record.get("not_reached") or [])
    # tune keeps them in its part "sweep", because the rest of its file is what the kernels read.
    left += (record.get("sweep") or {}).get("not_reached") or []
    # peers has a row for every arm, whose status says it.
    for case in record.get("cases") or []:
        for row in case["rows"]:
            if row["status"].startswith(("not reached", "stopped")):
                left.append(f"{case['shape']}: {row['arm']}")
    return left


class Record:
    """Outcomes by step, kept in the results' folder for the next call."""

    def __init__(self, results: Path, dry: bool) -> None:
        self.path = results / STATE
        self.dry = dry
        self.begun = datetime.now(UTC)
        self.outcomes: defaultdict[str, Outcome] = defaultdict(Outcome)
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        """Take over what an earlier call noted, unless it is too old."""
        try:
            content = json.loads(self.path.read_text())
            was_dry = bool(content["dry"])
            steps = content["steps"]
            begun = datetime.fromisoformat(content["begun"])
            age = self.begun - begun
            found = {}
            for name, outcome in steps.items():
                found[name] = Outcome(**outcome)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not a record of earlier calls ({error!r}); move it away"
            ) from None
        if age > FRESH:
            print(f"{self.path} was begun on {begun:%Y-%m-%d}: beginning anew", flush=True)
            return
        # Mixed, tiny sizes on a CPU would stand among a GPU's times.
        if was_dry != self.dry:
            kind = "a dry run" if was_dry else "a run on a GPU"
            raise ValueError(
                f"{self.path.parent} holds the results of {kind}; choose another folder with --out"
            )
        self.begun = begun
        self.outcomes.update(found)

    def put(self, name: str, outcome: Outcome) -> None:
        """Note an outcome and write the record, whole or not at all."""
        self.outcomes[name] = outcome
        steps = {step: asdict(found) for step, found in self.outcomes.items()}
        # Renaming replaces the old record at once: a call that is killed while it writes leaves it.
        part = self.path.with_suffix(".part")
        content = {"dry": self.dry, "begun": self.begun.isoformat(), "steps": steps}
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.path)

    def still_to_do(self, steps: Sequence[Step]) -> list[Step]:
        """Return what is not done: the unfinished in the table's order, then what failed by
        itself."""
        left = [step for step in steps if self.outcomes[step.name].result != "ok"]
        # What failed comes last: it may well fail again, and must not take the time of the others.
        # Sorting is stable, so both parts keep the table's order.
        return sorted(left, key=lambda step: self.outcomes[step.name].result == "failed")
