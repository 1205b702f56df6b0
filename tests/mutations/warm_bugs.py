"""Bugs in restarts from snapshots in memory. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

WARM = "megalora/train/warm"
MEMORY = f"{WARM}/memory.py"
PARENT = f"{WARM}/parent.py"
RESTORE = f"{WARM}/restore.py"
PROCESSES = f"{WARM}/processes.py"
OF_MEMORY = "tests/train/warm/test_memory.py"
OF_PARENT = "tests/train/warm/test_parent.py"

WARM_BUGS: tuple[Bug, ...] = (
    bug(0, "a torn slot is taken for the snapshot before it", MEMORY,
        "        self._commit(slot, 0)\n        with", "        with",
        f"{OF_MEMORY} half_written"),
    bug(0, "the commit word stands before the bytes", MEMORY,
        "        self._commit(slot, 0)\n        with",
        "        ENTRY.pack_into(self._entries, slot.place, step, 0, 0, bytes(32))\n"
        "        self._commit(slot, step + 1)\n        with",
        f"{OF_MEMORY} half_written"),
    bug(0, "the newer snapshot is written over", MEMORY,
        "steps.index(min(steps))", "steps.index(max(steps))",
        f"{OF_MEMORY} take_turns"),
    bug(0, "one rank goes on a step later than another", MEMORY,
        "common & steps", "common | steps",
        f"{OF_MEMORY} that_all_have"),
    bug(0, "a step that only some have is kept for the next attempt", PARENT,
        "                self.memory.forget_but(step)\n", "",
        f"{OF_PARENT} when_one_is_killed"),
    bug(0, "a snapshot of another rank or step passes", RESTORE,
        '(described["rank"], described["step"]) != (rank, step)', "False",
        f"{OF_MEMORY} another_rank"),
    bug(0, "memory wins over a later step on disk", "megalora/train/checkpoint/where.py",
        "if found.state is not None and found.state.step > state.step:", "if False:",
        f"{OF_MEMORY} newer_of"),
    bug(0, "a snapshot that could not be written, in silence", f"{WARM}/snapshots.py",
        "if self._error is not None:", "if False:",
        f"{OF_MEMORY} settle_returns"),
    bug(0, "nobody waits for the snapshot before", f"{WARM}/snapshots.py",
        "self._thread.join()", "self._thread.join(0)",
        f"{OF_MEMORY} settle_returns"),
    bug(0, "a snapshot counts as saved on disk", "megalora/train/saver.py",
        "self.saved_step = state.step if state else -1", "pass",
        f"{OF_PARENT} killed_is_the_same"),
    bug(0, "what a rank waits for without end", PARENT,
        "                ranks.end(GRACE_S)\n", "                pass\n",
        f"{OF_PARENT} when_one_is_killed"),
    bug(0, "forked ranks make a mistake again", PARENT,
        "code in (0, MISTAKE) or", "code == 0 or",
        f"{OF_PARENT} mistake_is_made"),
    bug(0, "ranks are not told to stop", PARENT,
        "if self._ranks is not None:", "if False:",
        f"{OF_PARENT} signal_is_passed"),
    bug(0, "forked with threads", PROCESSES, "if len(threads) > 1:", "if False:",
        f"{OF_PARENT} with_threads"),
    bug(0, "the plan forgets the slots of the launcher", "megalora/planner/save_bytes.py",
        "kept + SLOTS * buffer if", "kept if",
        "tests/planner/test_save_bytes.py in_memory"),
)  # fmt: skip
