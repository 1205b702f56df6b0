"""Put one bug after the other into a copy of the code and see its tests fail.

    python -m tests.mutations.run [TEXT ...] [--shard 2/4] [--at-once 2]

Only bugs whose name contains a TEXT, or all of them. Before the bugs of a test file, the same tests
run without a bug, which must pass. Prints which test caught which bug; exit code 1 when one was not
caught. Everything heavy is imported once; every bug gets a forked process that forgets our own
modules and imports the copy's. ``--shard I/N`` takes the I-th of N parts of about equal size.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.overrides import _pop_mode

import tests.prepare  # noqa: F401  imports torch, Megatron, transformers once for all
from tests.forked import forked
from tests.mutations.bugs import Bug
from tests.mutations.every import EVERY_BUG

ROOT = Path(__file__).parents[2]
COPIED = (
    "megalora",
    "kernels",
    "tests",
    "benchmarks",
    "configs",
    "docs",
    "launch",
    "recipes",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
    ".ci",
)
OURS = ("megalora", "megalora_kernels", "recipes", "tests", "benchmarks", "docs")


class Failures:
    """A pytest plug-in that keeps the names of failed tests."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names.append(report.nodeid.split("::")[-1])


def copy_of_the_code(folder: Path) -> Path:
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(source, folder / name)
    return folder


def with_bug(code: Path, folder: Path, bug: Bug | None) -> None:
    shutil.copytree(code, folder)
    if bug is not None:
        path = folder / bug.file
        path.write_text(bug.put_into(path.read_text()))


def run_tests(folder: Path, file: str, expression: str, stop_early: bool) -> None:
    """In a forked process: import the copy and leave ``result.json`` in it."""
    for name in [n for n in sys.modules if n.split(".")[0] in OURS]:
        del sys.modules[name]
    _pop_mode()  # host.install() of the copy pushes its own
    os.chdir(folder)
    sys.path[:] = [
        str(folder),
        str(folder / "kernels"),
        *(p for p in sys.path if p not in ("", str(ROOT))),
    ]
    failures = Failures()
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={folder}"]
    # Long tests, too.
    arguments += ["-m", "not vllm and not cluster and not compiled"]
    if stop_early:
        arguments.append("-x")
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        code = pytest.main([*arguments, str(folder / file), "-k", expression], plugins=[failures])
    import megalora

    assert Path(str(megalora.__file__)).is_relative_to(folder), (
        f"tested {megalora.__file__}, not the copy"
    )
    (folder / "result.json").write_text(json.dumps({"code": int(code), "failed": failures.names}))


def outcome(folder: Path) -> tuple[bool, str]:
    """Whether every test passed, and if not, which failed."""
    result = folder / "result.json"
    if not result.is_file():
        return False, "the process died"
    content = json.loads(result.read_text())
    if content["code"] == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise SystemExit(f"no test was selected; see {folder}/output.txt")
    return content["code"] == 0, ", ".join(content["failed"]) or "import"


def by_test_file(bugs: Iterable[Bug]) -> dict[str, list[Bug]]:
    files: dict[str, list[Bug]] = {}
    for bug in bugs:
        files.setdefault(bug.tests.partition(" ")[0], []).append(bug)
    return files


def shard(bugs: Iterable[Bug], number: int, count: int) -> list[Bug]:
    """The ``number``-th, from 1, of ``count`` parts of about equal size. Bugs of one test file stay
    together, so that its tests run without a bug in one part alone."""
    parts: list[list[Bug]] = [[] for _ in range(count)]
    for group in sorted(by_test_file(bugs).values(), key=len, reverse=True):
        min(parts, key=len).extend(group)
    return parts[number - 1]


def any_of(expressions: Iterable[str]) -> str:
    """One expression for ``pytest -k`` that selects what any of these does. An empty one selects
    everything, as for pytest itself."""
    different = sorted(set(expressions))
    return "" if "" in different else " or ".join(f"({each})" for each in different)


def jobs(bugs: Iterable[Bug], code: Path, root: Path) -> Iterator[Any]:
    """For each test file: its tests without a bug, then once for each bug."""
    numbers = itertools.count()
    for file, group in by_test_file(bugs).items():
        expressions = {bug.tests.partition(" ")[2] for bug in group}
        any_of_them = any_of(expressions)
        for bug in (None, *group):
            folder = root / str(next(numbers))
            with_bug(code, folder, bug)
            expression = bug.tests.partition(" ")[2] if bug else any_of_them
            yield (bug, file, folder), run_tests, (folder, file, expression, bug is not None)


def try_bugs(bugs: list[Bug], at_once: int) -> list[str]:
    """Print what became of each; names of those that were not caught.

    Where tests fail without a bug, nothing is known of the bugs that they are for: none of these
    counts as caught.
    """
    survived: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        code = copy_of_the_code(Path(root) / "code")
        for (bug, file, folder), seconds, _ in forked(jobs(bugs, code, Path(root)), at_once):
            passed, failed = outcome(folder)
            if bug is None and not passed:
                said = (folder / "output.txt").read_text()[-3000:]
                print(f"without a bug: {failed} failed in {file}\n{said}", flush=True)
                survived += [bug.name for bug in by_test_file(bugs)[file]]
            elif bug is None:
                print(
                    f"   no bug in {file:46} {seconds:4.0f} s  all pass, as they must", flush=True
                )
            else:
                said = "NOT CAUGHT" if passed else f"caught by {failed}"
                print(f"{bug.pitfall:2d} {bug.name:55} {seconds:4.0f} s  {said}", flush=True)
                survived += [bug.name] * passed
            shutil.rmtree(folder)  # 8 MB each
    return list(dict.fromkeys(survived))


def shard_option(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, as in 2/4")
    return int(number), int(count)


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.run")
    parser.add_argument("wanted", nargs="*", metavar="TEXT", help="a part of bugs' names")
    parser.add_argument("--shard", type=shard_option, default=(1, 1), metavar="I/N")
    parser.add_argument("--at-once", type=int, default=2, help="processes side by side")
    args = parser.parse_args(given)
    named = [b for b in EVERY_BUG if not args.wanted or any(t in b.name for t in args.wanted)]
    bugs = shard(named, *args.shard)
    if not bugs:
        raise SystemExit(f"no bug's name contains {' or '.join(args.wanted)}")
    survived = try_bugs(bugs, args.at_once)
    print(
        f"{len(bugs) - len(survived)} of {len(bugs)} bugs caught"
        + (f"; not: {', '.join(survived)}" if survived else "")
    )
    sys.exit(bool(survived))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
