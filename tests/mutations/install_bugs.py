"""Bugs in what an installed megalora says of itself."""

from tests.mutations.bugs import Bug, bug

VERSIONS = "megalora/bench/versions.py"
TEST = "tests/test_install.py somebody_else_s_commit"

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
)
