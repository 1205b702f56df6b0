"""Find in vLLM's log what went wrong."""

import re
from pathlib import Path

_PREFIX = re.compile(r"^\([^)]*pid=\d+\)\s*(?:[A-Z]+ \d\d-\d\d [\d:.]+ (?:\[[^\]]*\])?)?\s*")
"""What stands before a message: (EngineCore pid=12) ERROR 01-31 10:20:30 [core.py:1]."""
_MISTAKE = re.compile(r"(?:\w*(?:Error|Exception)\b: .|error: .)")
_REASON = re.compile(r"^\s+Value error, (.+?)(?: \[type=.*)?$")
"""What pydantic says below ``1 validation error for VllmConfig``."""
_CONSEQUENCES = (
    "validation error for ",
    "Engine core initialization failed",
    "See root cause above",
    "raise ",
)
"""Parts of lines that only follow from an error before them."""


def last_errors(log: Path, count: int = 3) -> str:
    """The last lines of the log that name an error, causes rather than what follows from them."""
    lines: list[str] = []
    errors: list[str] = []
    for line in log.read_text(errors="replace").splitlines():
        if not line.strip():
            continue
        prefix = _PREFIX.match(line)
        is_warning = prefix is not None and " WARNING " in prefix[0]
        line = _PREFIX.sub("", line)
        lines.append(line)
        if reason := _REASON.match(line):
            line = f"ValueError: {reason[1]}"
        # A warning may name an error that it is to prevent.
        if is_warning:
            continue
        # Every process that an error passes through logs it again.
        if _MISTAKE.search(line) and line not in errors:
            errors.append(line)
    causes = [line for line in errors if not _is_consequence(line)]
    # Without any error, the end of the log is the best there is.
    shown = (causes or errors or lines)[-count:]
    return "\n  ".join(shown) or "(its log is empty)"


def _is_consequence(line: str) -> bool:
    return any(part in line for part in _CONSEQUENCES)
