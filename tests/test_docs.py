"""Check that the documentation is true: generated pages are current, links resolve, commands
parse."""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from docs.scripts import __main__ as docs
from docs.scripts import figures, options, quickstart_rl, readme
from docs.scripts.quickstart import record
from docs.scripts.sections import fill
from megalora.cli import main as cli
from megalora.config.reference import field_docstrings

README = docs.ROOT / "README.md"
PAGES = [
    README,
    docs.ROOT / "CONTRIBUTING.md",
    docs.ROOT / "kernels/README.md",
    docs.ROOT / "benchmarks/README.md",
    docs.ROOT / "recipes/smollm2/README.md",
    *sorted((docs.ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# [text](target), and [name]: target at the end of a page.
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)


def relative(path: Path) -> str:
    return path.relative_to(docs.ROOT).as_posix()


def commands(page: str) -> Iterator[str]:
    """Commands in blocks of ``bash``, and after a prompt in blocks of ``console``."""
    for language, block in BLOCK.findall(page):
        # A backslash at the end of a line joins the next one to it.
        for line in block.replace("\\\n", " ").splitlines():
            if language == "bash" and line.strip():
                yield line
            elif language == "console" and line.startswith("$ "):
                yield line.removeprefix("$ ")


def problem(command: str) -> str | None:
    """What is wrong with a command, as far as it can be said without running it.

    Checks arguments of ``megalora``, targets of ``make``, modules of ``python -m``, and that
    scripts exist. Other programs (pip, git, docker) are not looked at.
    """
    words = shlex.split(command, comments=True)
    # What follows names the file that the shell writes.
    if ">" in words:
        words = words[: words.index(">")]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        # An environment variable set for the command.
        words.pop(0)
    if not words or words[0] == "export":
        return None
    program = Path(words[0]).name
    arguments = words[1:]
    if program == "megalora":
        return parse_problem(arguments)
    if program == "make":
        return make_problem(arguments)
    if program.startswith("python") and arguments[:1] == ["-m"]:
        if importlib.util.find_spec(arguments[1]) is None:
            return f"no module {arguments[1]}"
        return None
    for word in words:
        is_script = re.fullmatch(r"[\w./-]+\.sh|\.ci/run", word)
        if is_script and not (docs.ROOT / word).is_file():
            return f"there is no {word}"
    return None


def make_problem(arguments: list[str]) -> str | None:
    """The first target that the Makefile lacks; ``NAME=value`` sets a variable."""
    makefile = (docs.ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE)
    for word in arguments:
        if "=" not in word and word not in targets:
            return f"make has no target {word}"
    return None


def parse_problem(arguments: list[str]) -> str | None:
    """What the command line's parser says of these arguments, and keys that no config has."""
    # What follows goes to vLLM.
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    try:
        parsed, rest = cli._parser().parse_known_args(arguments)
    except SystemExit as ended:
        # --help and --version end with 0.
        return "the parser refuses it" if ended.code else None
    # Overrides among options are left over too: they have a = and no dash.
    for word in rest:
        if word.startswith("-") or "=" not in word:
            return f"megalora {parsed.command} knows no {word}"
    # Keys in the first column of the options page, such as | `train.lr` |.
    known = set(re.findall(r"^\| `([a-z.]+_?[a-z_]*)` ", options.page(), re.MULTILINE))
    for word in [*getattr(parsed, "overrides", []), *rest]:
        key = word.partition("=")[0]
        if "." in word and key not in known:
            return f"there is no key {word}"
    return None


def anchors(page: Path) -> list[str]:
    """What GitHub calls the headings of a page: lower case, hyphens for blanks, no punctuation."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        found.append(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page: Path) -> None:
    text = page.read_text()
    # Not in blocks of code, where brackets are Python's.
    for match in LINK.finditer(BLOCK.sub("", text)):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if target.startswith(("http://", "https://")):
            continue
        # A bare #anchor is in the page itself.
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{relative(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(there), f"{relative(page)} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_parse(page: Path) -> None:
    for command in commands(page.read_text()):
        assert not (found := problem(command)), f"{relative(page)}: {command}: {found}"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("megalora train c.yaml --nproc 8 train.lr=1e-4  # fine", None),
        ("NNODES=4 launch/torchrun_node.sh c.yaml", None),
        ("megalora trian c.yaml", "the parser refuses it"),
        ("megalora plan c.yaml --gpus 8 --gups 4", "megalora plan knows no --gups"),
        ("megalora train c.yaml train.learning_rate=3", "there is no key train.learning_rate=3"),
        ("megalora train c.yaml train.steps=3 lora.r=8", "there is no key lora.r=8"),
        ("make quickstrat", "make has no target quickstrat"),
        ("python -m benchmarks.paritee", "no module benchmarks.paritee"),
        ("bash launch/globally.sh", "there is no launch/globally.sh"),
    ],
)
def test_a_wrong_command_is_found(command: str, said: str | None) -> None:
    assert problem(command) == said


def test_readme_fits_a_screen_or_two() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100


def test_readme_s_engines_agree_as_far_as_measured() -> None:
    """The one number of README that no record holds: the table it comes from is in measurements."""
    page = (docs.ROOT / "docs/measurements.md").read_text()
    table = page.partition("## Three engines")[2].partition("| allowed |")[0]
    # Its cells are differences such as 3.1e-06.
    largest = max(float(cell) for cell in re.findall(r"\d\.\de-0\d", table))
    assert f"differ by at most {largest:.1e}" in " ".join(README.read_text().split())


def test_a_section_without_a_script_is_refused() -> None:
    text = "# Page <!-- one -->\n\nold\n\n## End\n"
    assert fill(text, {"one": lambda: "new"}) == "# Page <!-- one -->\n\nnew\n\n## End\n"
    with pytest.raises(ValueError, match=r"has the sections \['one'\], expected \['two'\]"):
        fill(text, {"two": lambda: "new"})


def test_the_tour_names_files_that_exist() -> None:
    """Every path in backticks, and each file that is named right after its folder's path."""
    text = (docs.ROOT / "docs/code.md").read_text()
    paths = re.findall(r"`((?:megalora|kernels|benchmarks|launch|tests|docs)/[\w./*-]*)`", text)
    # Fewer would mean that the pattern has stopped matching.
    assert len(paths) > 40
    for path in paths:
        assert any(docs.ROOT.glob(path)), f"docs/code.md names {path}"


def test_numbers_are_of_the_records(tmp_path, monkeypatch) -> None:
    """Another record gives other numbers in README."""
    for path in readme.RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        if path.name == "planner_accuracy.json":
            # The planner is made to say an eighth more than was counted in one layout.
            row = next(row for row in content["rows"] if row["table"] == "memory")
            row["said"]["peak"] = row["found"]["peak"] * 1.125
        (tmp_path / path.name).write_text(json.dumps(content))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "peak memory is within 12.5 % of" in readme.claims()


def test_the_quickstart_s_record_keeps_lines_and_losses() -> None:
    # What a terminal shows: steps, a progress bar, blank lines. Evaluations have rows of their own.
    log = "1/2  a tiny base\nLoading ━━━ 100%\n\neval loss 6.7 at step 0\n2/2  answers\n"
    metrics = '{"step": 0, "eval_loss": 6.7}\n{"step": 1, "loss": 6.5, "lr": 0.1}\n'
    found = record(log, metrics)
    assert found["lines"] == ["1/2  a tiny base", "eval loss 6.7 at step 0", "2/2  answers"]
    assert (found["train"], found["eval"]) == ([[1, 6.5]], [[0, 6.7]])
    # A run that failed before its end is not one to show.
    with pytest.raises(
        ValueError, match=r"the log has steps \[1\] of 2; record a run that came to"
    ):
        record(log.replace("2/2  answers", ""), metrics)
    # The script's own headings are read as such.
    script = (docs.ROOT / "launch/quickstart.sh").read_text()
    lines = re.findall(r'^echo "(.+)"$', script, re.MULTILINE)
    assert len(record("\n".join(lines), metrics)["lines"]) == len(lines) >= 5


def test_the_record_of_rewards_is_of_a_whole_run() -> None:
    rows = [{"step": 0, "eval_loss": -0.5}]
    for step, reward in enumerate((0.25, 0.5), 1):
        rows.append({"step": step, "reward": reward, "engine_gap": step / 10})
    metrics = "\n".join(map(json.dumps, rows))
    found = quickstart_rl.record(metrics, steps=2, seconds=9)
    assert found["rewards"] == [0.25, 0.5] and found["largest_gap"] == 0.2
    with pytest.raises(ValueError, match="2 steps of 3; record a run that came to its end"):
        quickstart_rl.record(metrics, steps=3, seconds=9)
    # What docs/rl.md says of it in words.
    recorded = json.loads(figures.REWARDS.read_text())
    page = " ".join((docs.ROOT / "docs/rl.md").read_text().split())
    rewards = recorded["rewards"]
    first = sum(rewards[:5]) / 5
    last = sum(rewards[-5:]) / 5
    minutes, seconds = divmod(recorded["seconds"], 60)
    steps = len(rewards)
    said = f"From {first:.2f} to {last:.2f} in {steps} steps, {minutes} min {seconds} s"
    assert said in page
    assert f"more than {recorded['largest_gap']:.1e} on average" in page


def test_generated_files_are_current() -> None:
    stale = [path.relative_to(docs.ROOT).as_posix() for path in docs.stale()]
    assert not stale, f"{', '.join(stale)}: stale; run make docs"


def test_a_stale_page_is_named_and_then_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "GENERATED", {"page.md": lambda: "new\n"})
    (tmp_path / "page.md").write_text("old\n")
    assert docs.main(["--check"]) == 1
    assert "page.md is stale" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == "old\n", "--check writes nothing"
    assert docs.main([]) == 0
    assert (tmp_path / "page.md").read_text() == "new\n"
    assert docs.main(["--check"]) == 0


def test_a_key_without_a_docstring_is_refused() -> None:
    @dataclass
    class Section:
        told: int = 1
        """Number of things."""
        untold: int = 2

    with pytest.raises(ValueError, match="Section.untold has no docstring"):
        field_docstrings(Section)


def test_the_options_page_shows_values_and_defaults() -> None:
    page = options.page()
    row = (
        "| `train.recompute` | `off`, `selective`, `full` or a mapping of `layers` (integer),"
        " `rest` (`off`, `selective`) | `off` | "
    )
    assert row in page
    assert "| `model.path` | text | required | " in page
    assert "| `data.eval` | text or integer or number or null | `null` | " in page
    assert "| `lora.rank_pattern` | a mapping to integer | `{}` | " in page
