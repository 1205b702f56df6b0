"""Bugs in what an installed megalora says of itself, and in how the density of its code is
counted."""

from tests.mutations.bugs import Bug, bug

VERSIONS = "megalora/versions.py"
TEST = "tests/test_install.py somebody_else_s_commit"
DENSITY = "benchmarks/code_density.py"
DENSITY_TEST = "tests/test_code_density.py"

INSTALL_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "another repository's commit taken for ours",
        VERSIONS,
        'return bool(_git("ls-files", Path(__file__).name))',
        'return bool(_git("rev-parse", "HEAD"))',
        TEST,
    ),
    bug(
        0,
        "a wheel that forgets that files were changed",
        VERSIONS,
        'changed or at.endswith("+")',
        "changed",
        TEST,
    ),
    bug(
        0,
        "one thing unpacked counted as two assignments",
        DENSITY,
        "        and isinstance(node.value, ast.Tuple)\n",
        "",
        f"{DENSITY_TEST} tuple_assignment",
    ),
    bug(
        0,
        "comments for tools counted as explanations",
        DENSITY,
        " and not token.string.startswith(DIRECTIVES)",
        "",
        f"{DENSITY_TEST} every_construct",
    ),
    bug(
        0,
        "few comments counted as good",
        DENSITY,
        'if GOALS[name] == "at most" else value >= low',
        'if GOALS[name] == "at most" else value <= high',
        f"{DENSITY_TEST} which_end",
    ),
    bug(
        0,
        "only the last file of a part counted",
        DENSITY,
        "            total += constructs(text)\n",
        "            total = constructs(text)\n",
        f"{DENSITY_TEST} over_all_its_files",
    ),
)
