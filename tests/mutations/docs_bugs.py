"""Bugs of the scripts that write the documentation, and of what its pages are held against."""

from tests.mutations.bugs import Bug, bug

OPTIONS, README, MAIN = (f"docs/scripts/{name}.py" for name in ("options", "readme", "__main__"))
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
        "megalora/config/reference.py",
        'raise ValueError(f"{cls',
        'continue\n            raise ValueError(f"{cls',
        f"{TESTS} test_a_key_without_a_docstring_is_refused",
    ),
    bug(
        0,
        "fields that do not make the sizes are left off the table of config fields",
        "docs/scripts/config_fields.py",
        "{**family.sizes, **family.others}",
        "{**family.sizes}",
        f"{TESTS} test_generated_files_are_current",
    ),
    bug(
        0,
        "checking whether pages are current writes them",
        MAIN,
        "if check:",
        "path.write_text(text)\n        if check:",
        f"{TESTS} test_a_stale_page_is_named_and_then_written",
    ),
    bug(
        0,
        "README's error of the planner is that of the best layout",
        README,
        "max(largest, abs(error))",
        "min(largest, abs(error))",
        f"{TESTS} test_generated_files_are_current",
        ("largest = 0.0", "largest = 9.9"),
    ),
    bug(
        0,
        "README's number of layouts counts cases",
        README,
        "found = set()",
        "found = []",
        f"{TESTS} test_generated_files_are_current",
        ("found.add(tuple(", "found.append(tuple("),
    ),
    bug(
        0,
        "README's numbers are not read from the records",
        README,
        'return json.loads((RESULTS / f"{name}.json").read_text())',
        'return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())',
        f"{TESTS} test_numbers_are_of_the_records",
    ),
    bug(
        0,
        "an option of a command has another name than in the documentation",
        "megalora/cli/plan.py",
        '"--figure",',
        '"--picture",',
        f"{TESTS} test_commands_parse",
    ),
)
