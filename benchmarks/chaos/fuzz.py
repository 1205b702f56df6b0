"""Fuzz every reader for a while, led by coverage of our code where atheris is installed.

    python -m benchmarks.chaos.fuzz TARGET SECONDS CORPUS OUT

runs one target in this process and writes to OUT how many inputs were tried and which were wrong.
``make chaos`` calls it for each target, and keeps what was wrong in ``tests/hostile/corpus``, where
``make test`` tries it again. Without atheris inputs are changed by chance.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos.fault import HANG, LOST, REFUSED, Fault

KIND = "fuzzed input"
INSTALLED = Path(sys.prefix) / "fuzz"
"""Where ``make chaos`` has put atheris, beside all that is locked."""
HANG_S = 30
"""Seconds on a clock after which libFuzzer ends an input."""
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**53, 2**63, 2**64, 10**400, 1.5, 1e308, float("nan"), "", "F8",
    "a" * 5000, "(a+)+$", "../../etc", "\ud800", "${oc.env:HOME}", [], {}, [[]], {"": 0}, [0] * 500,
    {"a)": 2}, ["(x+x+)+y"],
)  # fmt: skip


def changed(data: bytes, chance: random.Random) -> bytes | None:
    """A JSON text with one value that no program would write; None for other bytes."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        keys = (
            node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        )
        for key in keys:
            places.append((node, key))
            pending.append(node[key])
    if not places:
        return None
    node, key = chance.choice(places)
    if chance.random() < 0.2:
        del node[key]
    else:
        node[key] = chance.choice(STRANGE)
    return json.dumps(tree).encode()


def _mutated(data: bytes, chance: random.Random) -> bytes:
    """Without atheris: a value, or a few bytes, replaced or left out."""
    if chance.random() < 0.7 and (other := changed(data, chance)) is not None:
        return other
    place = chance.randrange(len(data) + 1)
    return (
        data[:place] + chance.randbytes(chance.randrange(3)) + data[place + chance.randrange(9) :]
    )


class Tries:
    """Inputs of one target that were tried, and what was wrong with some."""

    def __init__(self, target: str, folder: Path, out: Path) -> None:
        self.target = target
        self.folder = folder
        self.out = out
        self.count = 0
        self.found: dict[str, tuple[str, bytes]] = {}
        """First words of a fault -> (fault, the shortest input)."""

    def one(self, data: bytes) -> None:
        # Here: the modules that it imports must be instrumented first.
        from benchmarks.chaos.fuzz_targets import fault_of

        self.count += 1
        if fault := fault_of(self.target, data, self.folder):
            key = fault[:40]
            if key not in self.found or len(data) < len(self.found[key][1]):
                self.found[key] = (fault, data)
                self.write()

    def write(self) -> None:
        found = [(fault, data.hex()) for fault, data in self.found.values()]
        self.out.write_text(json.dumps({"count": self.count, "found": found}))


def run_target(target: str, seconds: float, corpus: Path, out: Path) -> None:
    """Try inputs in this process, which ends with it."""
    sys.path.append(str(INSTALLED))
    seeds = sorted(path.read_bytes() for path in corpus.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        tries = Tries(target, Path(folder), out)
        try:
            import atheris
        except ImportError:
            tries.one(seeds[0])
            chance = random.Random(target)
            # Behind the first input, which waits for imports.
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                tries.one(_mutated(chance.choice(seeds), chance))
            tries.write()
            return
        with atheris.instrument_imports(include=["megalora"]):
            import benchmarks.chaos.fuzz_targets  # noqa: F401
        deadline = time.monotonic() + seconds

        def one(data: bytes) -> None:
            tries.one(data)
            if time.monotonic() > deadline:
                tries.write()
                # libFuzzer ends the process without a word to Python.
                os._exit(0)

        def mutate(data: bytes, limit: int, seed: int) -> bytes:
            other = changed(data, random.Random(seed)) if seed % 2 else None
            return (other or atheris.Mutate(data, limit))[:limit]

        options = ["-max_len=20000", f"-timeout={HANG_S}", "-rss_limit_mb=4000", "-verbosity=0"]
        with tempfile.TemporaryDirectory() as grown:
            # The first folder takes new inputs: the corpus itself stays as it is.
            atheris.Setup([sys.argv[0], *options, grown, str(corpus)], one, custom_mutator=mutate)
            atheris.Fuzz()


def fuzzed(corpus: Path, scratch: Path, seconds: float) -> Iterator[Fault]:
    """Each target in a process of its own, for so long; one fault for each target, and one for each
    thing that was found, whose input is put into the corpus."""
    for folder in sorted(path for path in corpus.iterdir() if path.is_dir()):
        out = scratch.with_name(f"fuzz_{folder.name}.json")
        command = [sys.executable, "-m", "benchmarks.chaos.fuzz", folder.name, str(seconds)]
        begun = time.monotonic()
        ended = subprocess.run(
            [*command, str(folder), str(out)], capture_output=True, cwd=out.parent, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
        )  # fmt: skip
        took = time.monotonic() - begun
        record = json.loads(out.read_text()) if out.is_file() else {"count": 0, "found": []}
        for fault, data in record["found"]:
            content = bytes.fromhex(data)
            name = f"found_{hashlib.sha256(content).hexdigest()[:12]}"
            (folder / name).write_bytes(content)
            yield Fault(KIND, f"{folder.name}: {name}", LOST, took, fault)
        said = ended.stderr.decode(errors="replace")[-300:]
        what = f"{folder.name}: {record['count']:,} inputs"
        # libFuzzer ends the process at an input that takes too long, or too much memory.
        result = REFUSED if ended.returncode == 0 else HANG
        yield Fault(KIND, what, result, took, "" if result == REFUSED else said)


if __name__ == "__main__":
    run_target(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
