"""Config files and overrides that no person would write: refused in one line, and soon."""

from pathlib import Path

import pytest

from megalora.config.file import load_config
from tests.minimal_config import MINIMAL, minimal, refusal

__all__ = ["minimal"]  # a fixture

# A few lines more would fill the memory: nine values, and each level repeats the one before eleven
# times, 9 * 11^4 in some 300 bytes.
NESTED_ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
for _level in range(1, 5):
    _items = ", ".join([f"*a{_level - 1}"] * 11)
    NESTED_ALIASES += f"a{_level}: &a{_level} [{_items}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # A value that contains itself; depth at which a recursive reader fails; size.
        ("model: &a [*a]", "*a stands inside what it names"),
        ("model: &a {path: {x: *a}}", "*a stands inside what it names"),
        ("[" * 5000, "nested more than 50 deep"),
        ("{a: " * 3000, "nested more than 50 deep"),
        ("\n".join("  " * depth + "a:" for depth in range(400)), "nested more than 50 deep"),
        (NESTED_ALIASES, "more than 20,000 values, aliases written out"),
        # Exceptions of Python and of the YAML reader, each of another type, where a value is made.
        ("model: {path: " + "1" * 5000 + "}", "Exceeds the limit (4300 digits)"),
        ("model: {path: !!int a}", "invalid literal for int() with base 10: 'a'"),
        ("model: {path: !!timestamp a}", "has no attribute 'groupdict'"),
        ("model: {path: !!bool maybe}", "'maybe'"),
        ("model: {path: '${model.path}'}", "Recursive interpolation detected"),
        ("model: {<<: *b}", "found undefined alias 'b'"),
        # No file may call a function.
        ("model: {path: !!python/object:os.system x}", "could not determine a constructor"),
    ],
    ids=lambda value: value[:20],
)
def test_a_hostile_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    said = refusal(path)
    assert said.startswith(f"{path}: ") and message in said
    # One line that fits a screen, whatever the file holds.
    assert "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # A key is names with dots between them; what stands after = is YAML.
        ("[=", "is not of the form section.key=value"),
        ("[=1", "is not of the form section.key=value"),
        ("lora.target_modules[0]=x", "is not of the form section.key=value"),
        ("=1", "is not of the form section.key=value"),
        ("model.path=&a [*a]", "*a stands inside what it names"),
        ("model.path=" + "[" * 5000, "nested more than 50 deep"),
        ("model.path=[", "expected the node content"),
        ("model.path=!!float a", "could not convert string to float: 'a'"),
    ],
)
def test_a_hostile_override_is_one_line(minimal: Path, override: str, message: str) -> None:
    said = refusal(minimal, override)
    assert said.startswith("override ") and message in said
    assert "\n" not in said and len(said) < 400


def test_aliases_and_merged_sections_still_work(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    more = (
        "lora: {target_modules: &names [q_proj, k_proj], exclude_modules: *names}\n"
        "log: {<<: {every: 7}}\n"
    )
    path.write_text(MINIMAL + more)
    config = load_config(path)
    assert config.lora.exclude_modules == config.lora.target_modules == ["q_proj", "k_proj"]
    assert config.log.every == 7


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "SLURM_JWT", "ANYTHING"],
)
def test_a_secret_of_the_environment_is_not_written_down(
    minimal: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("A_NAME", name)
    # By its name, and by one that is put together.
    for spelled in (name, "${oc.env:A_NAME}"):
        said = refusal(minimal, f"checkpoint.dir=${{oc.env:{spelled}}}")
        assert "is not read: configs are kept with every checkpoint" in said
        assert "s3cret" not in said and "\n" not in said


def test_a_folder_of_the_environment_is_read(
    minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_RUNS_DIR", "/runs")
    given = "checkpoint.dir=${oc.env:MY_RUNS_DIR}/${oc.env:SLURM_JOB_ID,local}"
    assert load_config(minimal, [given]).checkpoint.dir == "/runs/local"
    missing = refusal(minimal, "checkpoint.dir=${oc.env:SLURM_JOB_ID}")
    assert "there is no environment variable SLURM_JOB_ID" in missing
