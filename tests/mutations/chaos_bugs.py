"""Bugs in saving and resuming that injected faults must show. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

LOAD = "megalora/train/checkpoint/load.py"
SAVE = "megalora/train/checkpoint/save.py"
WRITER = "megalora/train/checkpoint/writer.py"
WHERE = "megalora/train/checkpoint/where.py"
TESTS = "tests/test_chaos.py"

CHAOS_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a turned bit of a rank's file is trained on",
        LOAD,
        "if fault := digest_fault(saved.folder, index, name):",
        "if (fault := digest_fault(saved.folder, index, name)) and not fault:",
        f"{TESTS} damaged_files",
    ),
    bug(
        0,
        "the state of another step is taken for this one's",
        WHERE,
        "if CHECKPOINT_NAME.fullmatch(folder.name) and folder.name",
        "if not folder.name and folder.name",
        "tests/train/test_where.py another_step_than",
    ),
    bug(
        0,
        "what a killed save has left stays",
        WRITER,
        "        elif match:\n            shutil.rmtree(path)",
        "        elif match:\n            pass",
        f"{TESTS} killed_or_fails",
    ),
    bug(
        0,
        "a run begins afresh beside checkpoints that latest does not name",
        WHERE,
        "    if not there:\n        return Found(None)\n    whole: list",
        "    if not there or named is None:\n        return Found(None)\n    whole: list",
        f"{TESTS} every_point",
    ),
    bug(
        0,
        "a checkpoint that has vanished is looked up in a list",
        SAVE,
        "        if newest not in there:\n",
        "        if False:\n",
        f"{TESTS} run_folder_that_vanishes",
    ),
    bug(
        0,
        "a turned bit of an adapter's file is resumed beside",
        WHERE,
        "            check_sums(folder, needed, of_ranks)",
        "            check_sums(folder, needed, [*of_ranks, WEIGHTS])",
        f"{TESTS} each_file",
    ),
    bug(
        0,
        "a list of digests may be cut",
        "megalora/adapters/sums.py",
        "            if name.as_posix() not in sums:",
        "            if False:",
        "tests/adapters/test_sums.py",
    ),
    bug(
        0,
        "a checkpoint that has lost its digests is an old one",
        WHERE,
        "    if state.has_sums or (folder / SUMS).is_file():",
        "    if (folder / SUMS).is_file():",
        f"{TESTS} each_file",
    ),
    bug(
        0,
        "a busy machine is a hang",
        "benchmarks/chaos/children.py",
        '        if now_taken != taken or state == "R":\n',
        "        if taken < 0:\n",
        f"{TESTS} how_children_end",
    ),
)
