"""Run docs/first-hour.md from top to bottom, and record the seconds of its sections.

    python -m benchmarks.first_hour            # writes benchmarks/results/first_hour.json

Blocks of ``bash`` run in one shell. A block in another language is a file, which the paragraph
before it names (`Save this as `NAME``). A block of ``text`` is what is printed: a number stands for
any number, ``...`` for any text.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megalora.serve.server import free_port
from megalora.serve.vllm_python import vllm_python
from megalora.versions import versions

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/first-hour.md"
RECORD = ROOT / "benchmarks/results/first_hour.json"
PORT = "8000"
"""Port on the page, in whose place a free one is taken."""
BLOCK = re.compile(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"Save this as `([\w.]+)`")
MARK = "@@ section "


@dataclass
class Section:
    """A part of the page under one heading, and what came of running it."""

    title: str
    commands: str = ""
    """All of its blocks of bash."""
    expected: list[str] = field(default_factory=list)
    """Lines of its blocks of text."""
    printed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """When each line was printed, since the first command of the page."""
    began: float = 0.0
    ended: float = 0.0


def sections_of(page: str) -> tuple[list[Section], dict[str, str]]:
    """Sections with commands, in order; and files by name.

    Raises:
        ValueError: the page does not name a file that it shows.
    """
    found: list[Section] = []
    files: dict[str, str] = {}
    end = 0
    for match in BLOCK.finditer(page):
        heading, language, text = match.groups()
        if heading:
            found.append(Section(heading))
        elif language == "bash":
            found[-1].commands += text
        elif language == "text":
            found[-1].expected += text.splitlines()
        elif language != "sh":
            names = FILE.findall(page[end : match.start()])
            if not names:
                raise ValueError(f"no file is named before the block: {text[:40]!r}")
            files[names[-1]] = text
        end = match.end()
    return [section for section in found if section.commands], files


def run(
    sections: Iterable[Section], files: Mapping[str, str], folder: Path, env: Mapping[str, str]
) -> None:
    """Run all sections in one shell in ``folder``, and note what they print, and when.

    Raises:
        RuntimeError: a command failed; the message has what was printed last.
    """
    sections = list(sections)
    port = str(free_port("127.0.0.1"))
    for name, text in files.items():
        (folder / name).write_text(text.replace(PORT, port))
    # Whatever was started in the background ends with the shell.
    script = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for number, section in enumerate(sections):
        script += [f"echo '{MARK}{number}'", section.commands.replace(PORT, port)]
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(script)], cwd=folder, env=env, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    start = time.monotonic()
    now = sections[0]
    for line in process.stdout:
        seconds = time.monotonic() - start
        if line.startswith(MARK):
            now.ended = seconds
            now = sections[int(line.removeprefix(MARK))]
            now.began = seconds
        else:
            now.printed.append(line.rstrip("\n").replace(port, PORT))
            now.seconds.append(seconds)
    now.ended = time.monotonic() - start
    if process.wait():
        last = "\n".join(now.printed[-20:])
        raise RuntimeError(f"{now.title}: exit code {process.returncode}\n{last}")


def not_printed(section: Section) -> list[str]:
    """Lines that the page shows and that were not printed."""
    return [line for line in section.expected if line.strip() and not _is_in(line, section.printed)]


def _is_in(line: str, printed: Iterable[str]) -> bool:
    """Whether one of the lines printed has the line's parts between ``...``, in order."""
    parts = [re.escape(_masked(part)) for part in line.split("...")]
    pattern = re.compile(".*".join(parts))
    return any(pattern.search(_masked(other)) for other in printed)


def _masked(line: str) -> str:
    """The line with every number as ``#``, since they differ between machines."""
    return re.sub(r"\d[\d.,]*(e[-+]\d+)?", "#", line).strip()


def own_command() -> dict[str, str]:
    """Variables with which ``megalora`` is this checkout's, on the CPU and without the hub."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


def environment() -> dict[str, str]:
    """Variables of the whole page: those, and where vLLM is.

    Raises:
        ValueError: vLLM is not installed.
    """
    python = vllm_python()
    # .../megalora/.venv-vllm/bin/python
    vllm = {"MEGALORA": str(python.parents[2]), "MEGALORA_VLLM_PYTHON": str(python)}
    return {**os.environ, **own_command(), **vllm}


def when(section: Section, pattern: str) -> float:
    """Seconds, since the first command of the page, at which a line was printed.

    Raises:
        ValueError: no line matches.
    """
    for line, seconds in zip(section.printed, section.seconds, strict=True):
        if re.search(pattern, line):
            return seconds
    raise ValueError(f"{section.title}: nothing printed matches {pattern!r}")


def record(sections: list[Section], load: float) -> dict:
    """What benchmarks/results/first_hour.json holds."""
    by_number = {section.title.partition(".")[0]: section for section in sections}
    served = by_number["7"]
    rows = []
    for section in sections:
        seconds = round(section.ended - section.began, 1)
        rows.append({"section": section.title, "seconds": seconds})
    return {
        "benchmark": "first_hour",
        "date": time.strftime("%Y-%m-%d"),
        "device": "CPU (x86_64)",
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "versions": versions(),
        "first_step_s": round(when(by_number["3"], r"^step 1/"), 1),
        "first_served_answer_s": round(when(served, r'"chatcmpl-') - served.began, 1),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RECORD, help="the record to write")
    out = parser.parse_args().out
    load = os.getloadavg()[0]
    sections, files = sections_of(PAGE.read_text())
    with tempfile.TemporaryDirectory() as folder:
        run(sections, files, Path(folder), environment())
    for section in sections:
        for line in not_printed(section):
            raise SystemExit(f"{section.title}: the page shows what was not printed: {line}")
    out.write_text(json.dumps(record(sections, load), indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
