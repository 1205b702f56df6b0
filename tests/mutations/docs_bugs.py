"""Bugs of the scripts that write the documentation, and of what its pages are held against."""

from tests.mutations.bugs import Bug, bug

OPTIONS, MAIN = (f"docs/scripts/{name}.py" for name in ("options", "__main__"))
TESTS = "tests/test_docs.py"

DOCS_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a new default of the learning rate, but not on the page of options",
        "megalora/config/train.py",
        "lr: float = 1e-4",
        "lr: float = 2e-4",
        f"{TESTS} test_generated_files_are_current",
    ),
    bug(
        0,
        "a key without a docstring is left off the page",
        OPTIONS,
        "raise ValueError(",
        "continue\n            raise ValueError(",
        f"{TESTS} test_a_key_without_a_docstring_is_refused",
    ),
    bug(
        0,
        "checking whether pages are current writes them",
        MAIN,
        "if check:",
        "path.write_text(text)\n        if check:",
        f"{TESTS} test_a_stale_page_is_named_and_then_written",
    ),
)
