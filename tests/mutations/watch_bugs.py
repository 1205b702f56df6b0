"""Bugs in the watch over ranks. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

JUDGE = "megalora/train/watch/judge.py"
WATCH = "megalora/train/watch/watch.py"
PULSE = "megalora/train/watch/pulse.py"
TESTS = "tests/train/test_watch.py"
FAULTS = f"{TESTS} survivors_end"

WATCH_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a rank that has left is lost",
        JUDGE,
        "if not beat.left and now_s",
        "if now_s",
        f"{TESTS} has_left",
    ),
    bug(
        0,
        "a thread that was held up once is lost",
        JUDGE,
        "lost = sorted(late & self.late)",
        "lost = sorted(late)",
        f"{TESTS} silent_rank",
    ),
    bug(
        0,
        "a judge that was stopped blames the others",
        JUDGE,
        "if gap_s > self.blink_s:",
        "if gap_s < 0:",
        f"{TESTS} was_stopped_itself",
    ),
    bug(
        0,
        "the shortest limit counts",
        JUDGE,
        "limit_s = max(limit_s, math.inf if",
        "limit_s = min(limit_s or math.inf, math.inf if",
        f"{TESTS} longest_limit",
    ),
    bug(
        0,
        "all ranks must move",
        JUDGE,
        "if before is None or beat.moves != before.moves:\n                self._moved_s = now_s",
        "if before is None:\n                self._moved_s = now_s",
        f"{TESTS} one_rank_that_moves",
    ),
    bug(
        0,
        "who waits is blamed",
        JUDGE,
        "if not present[rank].waits]",
        "if present[rank].waits]",
        f"{TESTS} holds_the_others_up",
    ),
    bug(
        0,
        "a first step has a limit",
        PULSE,
        "if longest_s is None or self.phase in UNLIMITED:",
        "if self.phase in UNLIMITED:\n            return None\n        if longest_s is None:\n"
        "            return self.floor_s\n        if False:",
        f"{TESTS} limits_of_phases",
    ),
    bug(
        0,
        "a rollout has a limit",
        PULSE,
        '"save", "rollout", "close"',
        '"save", "close"',
        f"{TESTS} limits_of_phases",
    ),
    bug(
        0,
        "the last save has the limit of the copies before it",
        PULSE,
        '"merge", "save", "rollout"',
        '"merge", "rollout"',
        f"{TESTS} limits_of_phases",
    ),
    bug(
        0,
        "nobody judges rank 0",
        WATCH,
        "if rank == 0 else [0]",
        "if rank == 0 else []",
        FAULTS,
    ),
    bug(
        0,
        "who sees rank 0 alone says that all hang",
        WATCH,
        "sees_all=rank == 0",
        "sees_all=True",
        FAULTS,
    ),
    bug(
        0,
        "every rank speaks",
        WATCH,
        "return silent.issuperset(range(first, self.rank))",
        "return True",
        FAULTS,
    ),
    bug(
        0,
        "a store that does not answer is waited for",
        WATCH,
        "for work in (self._look, self._look_at_store):",
        "for work in (self._look,):",
        FAULTS,
    ),
    bug(
        0,
        "a process that has ended is waited for until it is silent",
        WATCH,
        "beat.table == self._table and not runs(",
        "beat.table != self._table and not runs(",
        FAULTS,
    ),
    bug(
        0,
        "a process that has ended counts as running until torchrun asks for its code",
        "megalora/process_table.py",
        'ENDED = ("Z", "X")',
        "ENDED = ()",
        FAULTS,
    ),
)
