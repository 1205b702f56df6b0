"""Run the tests of hostile input, each of which is a fault: refused in a line, in bounded time."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from benchmarks.chaos.fault import HANG, LOST, REFUSED, Fault

KIND = "hostile input"
CORPUS = "tests/hostile"
LIMIT_S = 3600.0


def hostile_inputs(scratch: Path, *, quick: bool) -> Iterator[Fault]:
    """JSON, patterns, templates and answers of servers that no program would write."""
    report = scratch.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", ""]
    command += [f"--junitxml={report}", CORPUS + ("/test_hostile_json.py" if quick else "")]
    try:
        # In a process of its own: some of it is meant to exhaust one.
        subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        yield Fault(KIND, CORPUS, HANG, LIMIT_S)
        return
    # Written by pytest on this machine.
    for case in ET.parse(report).iter("testcase"):
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        detail = "" if wrong is None else str(wrong.get("message"))[:300]
        result = REFUSED if wrong is None else LOST
        yield Fault(KIND, str(case.get("name")), result, float(case.get("time", 0)), detail)
