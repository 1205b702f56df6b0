"""Put one bug after the other into a copy of the code and see its tests fail.

    python -m tests.mutations.run [TEXT ...]

Only bugs whose name contains a TEXT, or all of them; first the same tests without a bug, which must
pass. Prints which test caught which bug; exit code 1 when one was not caught. Everything heavy is
imported once; every bug gets a forked process that forgets our own modules and imports the copy's.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

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
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
    ".ci",
)
OURS = ("megalora", "megalora_kernels", "tests", "benchmarks", "docs")
AT_ONCE = 2


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


def run_tests(folder: Path, selections: list[str], stop_early: bool) -> None:
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
    code = 0
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        for selection in selections:
            file, _, expression = selection.partition(" ")
            arguments = [
                "-q",
                "-p",
                "no:cacheprovider",
                f"--rootdir={folder}",
                str(folder / file),
                "-k",
                expression,
            ]
            code = max(
                code, pytest.main([*arguments, *(["-x"] if stop_early else [])], plugins=[failures])
            )
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


def main(wanted: list[str]) -> None:
    bugs = [bug for bug in EVERY_BUG if not wanted or any(text in bug.name for text in wanted)]
    if not bugs:
        raise SystemExit(f"no bug's name contains {' or '.join(wanted)}")
    survived: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        code = copy_of_the_code(Path(root) / "code")

        def job(number: int, bug: Bug | None):
            folder = Path(root) / str(number)
            with_bug(code, folder, bug)
            selections = [bug.tests] if bug else sorted({b.tests for b in bugs})
            return (bug, folder), run_tests, (folder, selections, bug is not None)

        for (bug, folder), seconds, _ in forked(
            (job(i, b) for i, b in enumerate([None, *bugs])), AT_ONCE
        ):
            passed, failed = outcome(folder)
            if bug is None and not passed:
                raise SystemExit(
                    f"without a bug: {failed} failed\n{(folder / 'output.txt').read_text()[-3000:]}"
                )
            said = (
                "all pass, as they must"
                if bug is None
                else "NOT CAUGHT"
                if passed
                else f"caught by {failed}"
            )
            name = f"{bug.pitfall:2d} {bug.name}" if bug else "   no bug"
            print(f"{name:58} {seconds:4.0f} s  {said}", flush=True)
            survived += [bug.name] if bug and passed else []
    print(
        f"{len(bugs) - len(survived)} of {len(bugs)} bugs caught"
        + (f"; not: {', '.join(survived)}" if survived else "")
    )
    sys.exit(bool(survived))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
