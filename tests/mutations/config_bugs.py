"""Bugs in how a config is read and described. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

TREE = "megalora/config/tree.py"
FILE = "megalora/config/file.py"
SCHEMA = "megalora/config/schema.py"
OPTIONS_TEST = "tests/test_options_command.py"
RUNS_TEST = "tests/adapters/test_run_folders.py"
EARLY_TEST = "tests/test_early_refusals.py"
BASE_TEST = "tests/test_config_base.py"

CONFIG_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a base wins over the file that names it",
        TREE,
        "for file, content in reversed(files):",
        "for file, content in files:",
        f"{BASE_TEST} test_what_a_file_does_not_say_is_its_base_s",
    ),
    bug(
        0,
        "a base is looked for where the command is called",
        TREE,
        'path = path.parent / expand(base, f"{path}: base")',
        'path = Path(expand(base, f"{path}: base"))',
        f"{BASE_TEST} test_what_a_file_does_not_say_is_its_base_s",
    ),
    bug(
        0,
        "a circle of bases is known by the names of files alone",
        TREE,
        "if path.resolve() in [file.resolve() for file in known]:",
        "if path in known:",
        f"{BASE_TEST} test_a_circle_is_refused",
    ),
    bug(
        0,
        "the file of an option is blamed for what an override says",
        TREE,
        "            set_in.pop(name, None)\n",
        "            pass\n",
        f"{BASE_TEST} test_a_base_that_is_not_there_is_named_with_who_names_it",
    ),
    bug(
        0,
        "epochs that were asked for last are dropped in silence",
        FILE,
        "    _check_epochs_count(tree)\n",
        "",
        f"{BASE_TEST} test_steps_win_over_epochs_that_are_given_below_them",
    ),
    bug(
        0,
        "a run does not say that its epochs are not used",
        "megalora/train/duration.py",
        "    if options.steps is not None:\n        return (\n",
        "    if options.steps is not None:\n        return None\n        return (\n",
        "tests/train/test_duration.py test_steps_win_over_epochs_and_that_is_said",
    ),
    bug(
        0,
        "the schema lets unknown keys pass",
        SCHEMA,
        'return {"type": "object", "properties": properties, "additionalProperties": False}',
        'return {"type": "object", "properties": properties}',
        f"{OPTIONS_TEST} test_the_schema_takes_what_the_config_takes",
    ),
    bug(
        0,
        "the schema asks for no key of a mapping",
        SCHEMA,
        'return {**_mapping(keys), "required": required}',
        "return _mapping(keys)",
        f"{OPTIONS_TEST} test_the_schema_takes_what_the_config_takes",
    ),
    bug(
        0,
        "an option is looked up by its first letters alone",
        "megalora/config/reference.py",
        'ending = [full for full in known if full.endswith(f".{name}")]',
        "ending = [full for full in known if full.startswith(name)]",
        f"{OPTIONS_TEST} test_what_is_not_there",
    ),
    bug(
        0,
        "a default is not shown where an option has a help of its own",
        "megalora/cli/command_parser.py",
        'if is_shown and "default" not in text:',
        "if is_shown and not text:",
        "tests/test_help.py test_every_argument_is_explained_with_its_default",
    ),
    bug(
        0,
        "a run folder is taken for its latest checkpoint in silence",
        "megalora/cli/folders.py",
        "if note := taken_note(path, folder):",
        "if note := None:",
        f"{RUNS_TEST} test_commands_take_the_latest_checkpoint_and_say_so",
    ),
    bug(
        0,
        "a run does not resume from a run folder",
        "megalora/train/checkpoint/where.py",
        "folder = latest_adapter(given)",
        "folder = given",
        f"{RUNS_TEST} test_a_run_resumes_from_the_latest_checkpoint_of_another",
    ),
    bug(
        0,
        "a tiny model is made over another one",
        "megalora/cli/main.py",
        "    check_not_in_use(",
        "    str(",
        f"{EARLY_TEST} test_every_mistake_is_one_line_before_torch",
    ),
    bug(
        0,
        "torch is imported before a base is looked at",
        "megalora/cli/adapter.py",
        "def _merge(options: Any, _: list[str]) -> None:\n",
        "def _merge(options: Any, _: list[str]) -> None:\n    import torch  # noqa: F401\n",
        f"{EARLY_TEST} test_every_mistake_is_one_line_before_torch",
    ),
    bug(
        0,
        "./NAME counts as a model on the hub",
        "megalora/hf/folder.py",
        'return name.startswith((".", "/")) or',
        'return name.startswith("/") or',
        f"{EARLY_TEST} test_every_mistake_is_one_line_before_torch",
    ),
)
